"""A model made ready for sampling: layers fast for few rows, and weights unpacked once."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from dpo_minimal.extras import progress
from dpo_minimal.extras.machine import memory_now
from dpo_minimal.nf4 import NF4Linear


@contextmanager
def ready_to_sample(model: nn.Module):
    """Within the context there is no dropout, linear layers are `SamplingLinear`, nothing compiled.

    The results are equal up to rounding. Unpacking takes at most half of the memory that is free;
    4-bit layers that do not fit, or all of them where the system does not say what is free, stay as
    they are. Compiled blocks would be compiled again for each length of the cache.
    """
    layers = [
        (name, m) for name, m in model.named_modules() if isinstance(m, (NF4Linear, nn.Linear))
    ]
    dtype, replaced = model.model.embed_tokens.weight.dtype, {}
    training = model.training
    now = memory_now(str(model.lm_head.weight.device))
    left = now[1] // 2 if now else 0
    try:
        model.eval()
        for i, (name, layer) in enumerate(layers):
            progress.show("unpacking", i, len(layers), "layers")
            if isinstance(layer, NF4Linear):
                left -= layer.out_features * layer.in_features * dtype.itemsize
                if left < 0:
                    continue
            replaced[name] = layer
            model.set_submodule(name, SamplingLinear(layer, dtype))
        with uncompiled(model.model.layers):
            yield
    finally:
        for name, layer in replaced.items():
            model.set_submodule(name, layer)
        model.train(training)


def answer_tokens(run) -> int:
    """How long the answers may be by which a run is evaluated."""
    return 64 if run.on_forum else 128


class SamplingLinear(nn.Module):
    """A linear layer whose weight [out, in] lies there unpacked."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        super().__init__()
        packed = isinstance(layer, NF4Linear)
        weight = layer.dequantized(dtype) if packed else layer.weight.detach()
        self.weight = weight  # no buffer: nothing saves it or moves it

    def forward(self, x):  # [..., in] -> [..., out]
        rows = x.reshape(-1, x.shape[-1])  # [R, in]
        if not turned_is_faster(rows):
            return F.linear(x, self.weight)
        R = len(rows)
        if R > 12 and R % 4:  # 23 rows take longer than 24
            rows = F.pad(rows, (0, 0, 0, -R % 4))  # zeros behind the others
        y = (self.weight @ rows.t()).t()[:R]  # [R, out]
        return y.reshape(*x.shape[:-1], -1)


def turned_is_faster(rows) -> bool:
    """Whether (W x^T)^T takes less time than x W^T for rows [R, in].

    So it is in the CPU's library for 32 bits: by a factor of 1.1 to 4 at 2 to 128 rows.
    """
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and 1 < len(rows) <= 128


@contextmanager
def uncompiled(blocks):
    """A context in which blocks that `block.compile()` compiled run as they are written.

    A compiled kernel of theirs (`compiled.fused_form`) stays one.
    """
    calls = [block._compiled_call_impl for block in blocks]
    try:
        for block in blocks:
            block._compiled_call_impl = None
        yield
    finally:
        for block, call in zip(blocks, calls, strict=True):
            block._compiled_call_impl = call
