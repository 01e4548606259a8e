"""What the calls share: modules of the submission, tensors from arrays, gradients."""

import importlib

import torch
from torch import nn


def module(name: str):
    return importlib.import_module(f"dpo_minimal.{name}")


def tensor(array, dtype="float32", grad=False):
    return torch.tensor(array, dtype=getattr(torch, dtype)).requires_grad_(grad)


def parameter(array, dtype="float32"):
    return nn.Parameter(tensor(array, dtype))


def gradients(y, g, **leaves) -> dict:
    """d sum(y * g) / d leaf as `d leaf`; zeros where no gradient came."""
    (y * tensor(g).to(y)).sum().backward()
    return {f"d {n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
