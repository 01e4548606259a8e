"""What this machine says of a run: the memory that it took, and the memory that there is."""

import sys
from pathlib import Path

import torch


def peak_memory_gb() -> float:
    """The most memory held so far: the GPU's if one is used, else the process's."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return 0.0  # Python alone cannot tell
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def memory_now(device: str) -> tuple[int, int] | None:
    """(bytes held now, bytes still free) of a device; None where the system does not say."""
    if device.startswith("cuda"):
        held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return held, torch.cuda.mem_get_info(device)[0] + reserved - held
    try:
        held, free = field("/proc/self/status", "VmRSS"), field("/proc/meminfo", "MemAvailable")
    except (OSError, StopIteration):
        return None
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdecimal():
        free = min(free, max(0, int(limit.read_text()) - int(used.read_text())))  # a container's
    return held, free


def field(path: str, name: str) -> int:
    """A field of one of Linux's files, which count in KiB, in bytes."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def device_and_dtype(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    """What --device and --dtype mean: a GPU if there is one, bfloat16 on it and else float32.

    Cards before Ampere (capability 8.0) get float32, because they have no bfloat16 of their own.
    """
    device, usual = device or ("cuda" if torch.cuda.is_available() else "cpu"), "float32"
    if device.startswith("cuda"):
        prepare_gpu(device)
        if torch.cuda.get_device_capability(device) >= (8, 0):
            usual = "bfloat16"
    return device, getattr(torch, dtype or usual)


def prepare_gpu(device: str):
    """Settle what torch would else choose badly on a CUDA device."""
    if ":" in device:  # what torch.cuda says of memory and random state is then of this GPU
        torch.cuda.set_device(device)
    # cuDNN's attention plans anew for each shape, and nearly each batch has its own; with a mask
    # its gradients can be NaN (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
