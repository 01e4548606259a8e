"""A model made ready for sampling: its 4-bit weights are unpacked once, and not for each token."""

import sys
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from dpo_minimal.extras import progress
from dpo_minimal.extras.machine import memory_now
from dpo_minimal.nf4 import NF4Linear


@contextmanager
def ready_to_sample(model: nn.Module):
    """Within the context 4-bit layers are plain ones, and compiled blocks run uncompiled.

    The results are the same bits. Unpacking takes at most half of the memory that is free; layers
    that do not fit, or all of them where the system does not say what is free, stay as they are.
    Compiled blocks would be compiled again for each length of the cache.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, NF4Linear)]
    dtype, packed = model.model.embed_tokens.weight.dtype, {}
    now = memory_now(str(model.lm_head.weight.device))
    left = now[1] // 2 if now else 0
    try:
        for i, (name, layer) in enumerate(layers):
            progress.show("unpacking", i, len(layers), "layers")
            left -= layer.out_features * layer.in_features * dtype.itemsize
            if left < 0:
                break
            packed[name] = layer
            model.set_submodule(name, UnpackedLinear(layer, dtype))
        with eager():
            yield
    finally:
        for name, layer in packed.items():
            model.set_submodule(name, layer)


class UnpackedLinear(nn.Module):
    """A 4-bit layer whose weight [out, in] lies there in `dtype`."""

    def __init__(self, layer: NF4Linear, dtype: torch.dtype):
        super().__init__()
        self.weight = layer.dequantized(dtype)  # no buffer: nothing saves it or moves it

    def forward(self, x):  # [..., in] -> [..., out]
        return F.linear(x, self.weight)


def eager():
    """A context in which nothing is compiled; importing torch's compiler alone takes seconds."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
