"""More than one process, each with a GPU of its own: torchrun --nproc-per-node 2 train.py ...

Every process holds the whole model and takes its share of each batch. The base is frozen, so only
the adapters' gradients travel. They are added up, and the same optimizer step in every process
keeps the adapters equal. Losses are divided by what all processes score together, so the result is
that of one process up to rounding, however many there are (without dropout). Only process 0 writes.
Without torchrun there is one process, and nothing here does anything.
"""

import os

import torch
import torch.distributed as dist


def start(device: str) -> str:
    """Join the other processes, if torchrun started some; returns the device of this one."""
    if "LOCAL_RANK" not in os.environ:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    wait()
    return device


def processes() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is process 0, which writes for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait():
    """Wait until every process is here; for use before reading what process 0 has written."""
    if dist.is_initialized():
        dist.barrier()


def leave():
    """End the work in several processes: process 0 goes on alone, the others end here."""
    if not dist.is_initialized():
        return
    alone = first()
    dist.destroy_process_group()
    if not alone:
        # At once, because gloo's threads may still be at work and abort a process that ends slowly.
        os._exit(0)


def share(rows: list) -> list:
    """This process's part of a batch. Neighbours, about equally long, go to different processes."""
    return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows


def total(value):
    """A number, or each number of a dict, added up over all processes."""
    if not dist.is_initialized():
        return value
    parts = [None] * processes()
    dist.all_gather_object(parts, value)
    if not isinstance(value, dict):
        return sum(parts)
    names = dict.fromkeys(name for part in parts for name in part)  # a share may be empty
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


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
