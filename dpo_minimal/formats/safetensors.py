"""The safetensors format by hand.

A file is 8 bytes with the header's length, a JSON header {name: {dtype, shape, data_offsets}}, and
the tensors' bytes.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from dpo_minimal import InputError
from dpo_minimal.extras import progress
from dpo_minimal.extras.reading import reading, unique_keys
from dpo_minimal.files import whole_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint: its shape now, and its values when `read()` is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def open_safetensors(path) -> dict[str, LazyTensor]:
    """The tensors of a file by name, none of them read yet; InputError if the file is damaged.

    As the format asks, the tensors' bytes follow one another without a gap up to the file's end.
    """
    header, start, size = read_header(path)
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, first, last = read_entry(path, name, entry)
        spans.append((first, last))
        read = partial(read_tensor, path, dtype, shape, start + first)
        tensors[name] = LazyTensor(shape, dtype, read)
    at = start
    for first, last in sorted(spans):
        if start + first != at:
            raise InputError(f"{path}: damaged: its tensors overlap, or leave gaps")
        at = start + last
    if at != size:
        raise InputError(f"{path}: cut off or damaged at its end: copy the file again")
    return tensors


def read_entry(path, name: str, entry) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte after the last) of a header's entry, else InputError."""
    try:
        dtype, shape, (first, last) = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
        right = all(type(n) is int and n >= 0 for n in (first, last, *shape))
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise InputError(f"{path}: not a whole safetensors file (its header is damaged at {name})")
    if dtype not in DTYPES:
        raise InputError(f"{path}: {name} has dtype {dtype}, which cannot be read here")
    if last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise InputError(f"{path}: damaged: {name} has another size than its shape says")
    return DTYPES[dtype], tuple(shape), first, last


def read_header(path) -> tuple[dict, int, int]:
    """(the JSON header, the place of the first tensor's first byte, the file's size in bytes)."""
    with reading(path, "a whole safetensors file"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise ValueError("its header is cut off")
        header = json.loads(file.read(start - 8).decode(), object_pairs_hook=unique_keys)
    if not isinstance(header, dict):
        raise InputError(f"{path}: not a whole safetensors file (its header is damaged)")
    return header, start, size


def read_tensor(path, dtype: torch.dtype, shape, start: int) -> torch.Tensor:
    """The tensor whose bytes begin at `start`, in memory of its own."""
    tensor = torch.empty(shape, dtype=dtype)
    # A plain read and no memory map, because mapped pages of a 7B file would count as our memory.
    with open(path, "rb") as file:
        file.seek(start)
        file.readinto(tensor.flatten().view(torch.uint8).numpy())
    return tensor


def write_safetensors(path, shapes: dict, dtype: torch.dtype, read):
    """Write tensors of one dtype. shapes: {name: shape}; read(name) makes them one at a time."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = dict(dtype=NAMES[dtype], shape=list(shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, name in enumerate(shapes):
            progress.show(f"writing {path}", done, len(shapes), "tensors")
            flat = read(name).detach().to(dtype).cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)
