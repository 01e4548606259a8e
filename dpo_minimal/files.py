"""Files that are whole or not there, and the safetensors format by hand.

Everything is written beside its place and renamed into it. A safetensors file is 8 bytes with the
header's length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes.
"""

import json
import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch

from dpo_minimal import InputError

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def whole_file(path):
    """A binary file to write, renamed to `path` if all went well and removed if not."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path):
    """An empty folder to fill, renamed to `path` if all went well and removed if not."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path, value):
    """Write a value as an indented JSON file."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path) -> dict:
    """Read a JSON object; InputError if the file is missing, broken or something else."""
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


class LazyTensor:
    """A tensor in a safetensors file: its shape and dtype now, its bytes when `read` is called."""

    def __init__(self, path, dtype: torch.dtype, shape, start: int):
        self.path, self.dtype, self.shape, self.start = path, dtype, tuple(shape), start

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        # A plain read and no memory map: mapped pages of a 7B file would count as our memory.
        with open(self.path, "rb") as file:
            file.seek(self.start)
            file.readinto(tensor.flatten().view(torch.uint8).numpy())
        return tensor


def open_safetensors(path) -> dict[str, LazyTensor]:
    """The tensors of a file by name, none of them read yet; InputError if the file is damaged."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8)) if start <= size else None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        header = None
    damaged = InputError(f"{path}: not a whole safetensors file (its header is damaged)")
    if not isinstance(header, dict):
        raise damaged
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (first, last) = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
            if min(0, first, *shape) < 0:
                raise damaged
        except (KeyError, TypeError, ValueError):
            raise damaged from None
        if dtype not in DTYPES:
            raise InputError(f"{path}: {name} has dtype {dtype}, which cannot be read here")
        if last - first != math.prod(shape) * DTYPES[dtype].itemsize or start + last > size:
            raise InputError(f"{path}: cut off or damaged at {name}: copy the file again")
        tensors[name] = LazyTensor(path, DTYPES[dtype], shape, start + first)
    return tensors


def write_safetensors(path, shapes: dict, dtype: torch.dtype, read):
    """Write tensors of one dtype. shapes: {name: shape}; read(name) makes each in its turn."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = dict(dtype=NAMES[dtype], shape=list(shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            flat = read(name).detach().to(dtype).cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)
