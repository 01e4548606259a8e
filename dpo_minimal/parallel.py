"""More than one process, each with a GPU of its own: torchrun --nproc-per-node 2 train.py ...

Every process holds the whole model and takes its share of each batch. The base is frozen, so all
that travels are the adapters' gradients: they are added up, and the same optimizer step everywhere
keeps the adapters equal. The losses are divided by what all processes score together: the result
is that of one process to rounding, whatever their number (dropout aside). Process 0 alone writes.
Without torchrun there is one process, and nothing here does anything.
"""

import os
from collections import Counter

import torch
import torch.distributed as dist


def start(device: str) -> str:
    """Join torchrun's other processes, if there are any; returns this one's device."""
    if "LOCAL_RANK" not in os.environ:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    """Go on when every process has come here: before reading what process 0 writes."""
    if dist.is_initialized():
        dist.barrier()


def share(rows: list) -> list:
    """This process's part of a batch; neighbours in length go to different processes."""
    return rows[rank() :: processes()]


def total(counts: dict[str, float]) -> Counter:
    """Each name's values, added up over all processes."""
    parts = [counts] * processes()
    if dist.is_initialized():
        dist.all_gather_object(parts, counts)
    added = Counter()
    for part in parts:
        added.update(part)  # a Counter adds
    return added


def add_gradients(parameters):
    """Replace each parameter's gradient by its sum over all processes, in one message."""
    if not dist.is_initialized():
        return
    for p in parameters:
        if p.grad is None:  # this process's share of a small last batch was empty
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)
