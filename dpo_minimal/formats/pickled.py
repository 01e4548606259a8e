"""PyTorch's own files of tensors, *.bin and *.pth: read as data, so that nothing is executed."""

import torch

from dpo_minimal import InputError
from dpo_minimal.extras.reading import reading
from dpo_minimal.formats.safetensors import LazyTensor


def load_tensors(path) -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch file by name, mapped into memory; InputError for anything else."""
    with reading(path, "a PyTorch weights file"):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensors, dict):
        raise InputError(f"{path}: holds a {type(tensors).__name__} and not tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not is_plain(tensor):
            raise InputError(f"{path}: what it calls {name!r} is not a plain tensor")
    return tensors


def is_plain(tensor) -> bool:
    """Whether something is a tensor whose numbers are all there, none of them twice."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        return False
    if tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def open_bin(path) -> dict[str, LazyTensor]:
    """The tensors of a PyTorch file, as LazyTensors."""
    return {name: already_read(tensor) for name, tensor in load_tensors(path).items()}


def already_read(tensor: torch.Tensor) -> LazyTensor:
    """A tensor that is in memory, as a LazyTensor."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
