"""The launches, bytes and FLOPs of a DPO step on a GPU, counted without one, and a time from them.

    python benchmarks/count.py --json benchmarks/results/count-llama-2-7b.json

The step runs over tensors without numbers ("meta"), and each operation is written down: a launch,
the bytes that it reads and writes, and its FLOPs. Its time is the longer of bytes / bandwidth and
FLOPs / rate, at the rates that the flags state. So this is a lower bound on the time and not a
measurement: launches cost the host some 5 us each, which is told apart, and no kernel reaches a
rate exactly. Checkpointing is off, as it is by default where memory allows it.
"""

import argparse
import contextlib
import math
from collections import Counter
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from models import SHAPES
from record import save
from step import dpo_losses, make_batch, read_arguments, step_parser
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dpo_minimal import nf4
from dpo_minimal.extras import ragged
from dpo_minimal.extras.skeleton import skeleton
from dpo_minimal.llama import LlamaConfig
from dpo_minimal.lora import add_adapter, linear_layers

aten = torch.ops.aten
FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach, aten.alias}
GPU = torch.device("meta")


class Counting(TorchDispatchMode):
    """Counts what runs within, by part: {part: Counter of launches, bytes, flops, seconds}."""

    def __init__(self, args, scored: int):
        super().__init__()
        self.parts, self.inside, self.scored = {}, "", scored
        self.bandwidth, self.rate = args.bandwidth * 1e12, args.rate * 1e12

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation, kwargs = func.overloadpacket, kwargs or {}
        if operation is aten.nonzero:  # its size is in the numbers, which nobody has here
            out = torch.empty(self.scored, args[0].dim(), dtype=torch.int64, device=GPU)
        elif operation is aten.masked_scatter_backward:
            out = args[0].new_empty(args[2])
        else:
            out = func(*args, **kwargs)
        on_gpu = any(t.device == GPU for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        if func.is_view or operation in FREE or not on_gpu:
            return out
        flops = 0
        if operation in flop_registry:
            flops = flop_registry[operation](*args, **kwargs, out_val=out)
        size = num_bytes(args, kwargs)  # read
        if operation is not aten.copy_:  # which has written its first argument
            size += num_bytes(out)
        self.note(self.inside or ("matrix products" if flops else "the rest"), size, flops)
        return out

    def note(self, part: str, size: int, flops=0, rate=None):
        """Add a launch to a part."""
        seconds = max(size / self.bandwidth, flops / (rate or self.rate))
        one = dict(launches=1, bytes=size, flops=flops, seconds=seconds)
        self.parts.setdefault(part, Counter()).update(one)


def num_bytes(*tree) -> int:
    """Bytes of the tensors in nested lists and dicts, each once; expanded ones are not larger."""
    tensors = {id(t): t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
    return sum(
        t.element_size() * math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s)
        for t in tensors.values()
    )


class CountedAttention(torch.autograd.Function):
    """A fused kernel: it reads q, k, v and a mask, if any, and never writes [T, T] scores.

    4 FLOPs per channel for each pair of a query and a key; backward takes 2.5 times that, at half
    the rate.
    """

    @staticmethod
    def forward(ctx, counting, flops, rate, mask, q, k, v):
        ctx.counting, ctx.flops, ctx.rate, ctx.inputs = counting, flops, rate, (q, k, v)
        ctx.size = num_bytes(mask, q, k, v) + num_bytes(q)
        counting.note("attention", ctx.size, flops, rate)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx, grad):
        ctx.counting.note("attention", 2 * ctx.size, 5 * ctx.flops // 2, ctx.rate / 2)
        return None, None, None, None, *(torch.empty_like(t) for t in ctx.inputs)


def keep_mask(mask, positions, device):
    """What `ragged.mask_for` does where there is no kernel."""
    return mask


def build(args) -> torch.nn.Module:
    """The model as DPO trains it, of tensors without numbers."""
    config = LlamaConfig(**SHAPES[args.model.removeprefix("random:")])
    dtype = getattr(torch, args.dtype)
    model = skeleton(config).to(dtype)
    for name, layer in linear_layers(model).items():
        model.set_submodule(name, nf4.NF4Linear(empty_nf4(layer.weight.shape, dtype)))
    with torch.device(GPU):
        for name in ("sft", "dpo"):
            add_adapter(model, name, args.r, 2 * args.r, dropout=args.dropout, targets=args.targets)
    model.gradient_checkpointing = args.gradient_checkpointing
    nf4.keep_weights(model, args.gradient_checkpointing)
    return model.train()


def empty_nf4(shape, dtype) -> nf4.NF4Weight:
    """A doubly quantized weight without numbers."""
    blocks = shape.numel() // 64
    return nf4.NF4Weight(
        torch.empty(shape.numel() // 2, dtype=torch.uint8, device=GPU),
        tuple(shape),
        dtype,
        absmax_codes=torch.empty(blocks, dtype=torch.uint8, device=GPU),
        absmax_scale=torch.empty(-(-blocks // nf4.ABSMAX_BLOCK), device=GPU),
        absmax_offset=torch.empty((), device=GPU),
    )


def fused(counting):
    """What `nf4.fused_form` gives on CUDA, as one launch."""

    def dequantize(packed, absmax, dtype, code):
        out = torch.empty(len(packed), 2 * packed.shape[1], dtype=dtype, device=GPU)
        size = packed.numel() + 4 * absmax.numel() + out.numel() * out.element_size()
        counting.note("dequantizing", size)
        return out

    return lambda device: dequantize


def products(args) -> int:
    """Pairs of a query and a key that a row's mask allows: two causal texts, one with a prompt."""
    prompt, answer = args.prompt, args.length - args.prompt
    causal = args.length * (args.length + 1) // 2
    return causal + answer * prompt + answer * (answer + 1) // 2


def count_step(args) -> dict:
    """Forward, backward, clipping, AdamW: {part: {launches, bytes, flops, seconds}}."""
    model = build(args)
    lay_out = partial(ragged.Ragged, attend=None) if args.ragged else keep_mask
    with mock.patch.object(ragged, "mask_for", lay_out):
        batch = make_batch(args, model.config.vocab_size, GPU)
    counting = Counting(args, scored=2 * args.pairs * (args.length - args.prompt))
    right = nf4.dequantize_nf4

    def dequantize(quantized):
        counting.inside, before = "dequantizing", counting.inside
        weight = right(quantized)
        counting.inside = before
        return weight

    def attend(q, k, v, attn_mask, is_causal, enable_gqa):
        if isinstance(attn_mask, ragged.Ragged):
            attn_mask.attend = laid_out
            return attn_mask.attention(q, k, v)
        flops = 4 * q.numel() * k.shape[2]  # it computes what the mask forbids, too
        return CountedAttention.apply(counting, flops, args.mask_rate * 1e12, attn_mask, q, k, v)

    def laid_out(q, k, v, *_, window_size):  # [N or M, H, K]
        flops = 4 * q.shape[1] * q.shape[2] * args.pairs * products(args)
        return CountedAttention.apply(counting, flops, args.ragged_rate * 1e12, None, q, k, v)

    trained = [p for p in model.parameters() if p.requires_grad]
    with contextlib.ExitStack() as stack:
        for place, name, value in (
            (nf4, "dequantize_nf4", dequantize),
            (F, "scaled_dot_product_attention", attend),
            (nf4, "fused_form", fused(counting) if args.fused else lambda device: None),
        ):
            if hasattr(place, name):
                stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(counting)
        dpo_losses(model, batch).mean().backward()
    # Clipping and a fused AdamW: a few launches; weight, gradient, two moments, read and written.
    counting.note("optimizer", sum(7 * 4 * p.numel() for p in trained))
    return counting.parts


def main():
    """The command line: a table, and the counts as JSON."""
    parser = step_parser(__doc__, model="random:llama-2-7b", length=1024)
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("--fused", action=on_off, default=True, help="dequantize in one kernel")
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s of the memory")
    parser.add_argument("--rate", type=float, default=700, help="TFLOP/s of matrix products")
    parser.add_argument("--ragged", action=on_off, default=True, help="attention without the mask")
    parser.add_argument("--mask-rate", type=float, default=130, help="TFLOP/s of masked attention")
    parser.add_argument("--ragged-rate", type=float, default=200, help="TFLOP/s without the mask")
    parser.set_defaults(dtype="bfloat16", device="meta", gradient_checkpointing=False)
    args = read_arguments(parser)
    parts = count_step(args)
    total = sum(parts.values(), Counter())
    for name, part in [*parts.items(), ("all", total)]:
        work = f"{part['bytes'] / 1e9:8.1f} GB {part['flops'] / 1e12:8.1f} TFLOP"
        print(f"{name:16} {part['launches']:7,} launches {work} {part['seconds'] * 1e3:8.0f} ms")
    result = {"parts": {name: dict(part) for name, part in parts.items()}, "all": dict(total)}
    save(args, result)


if __name__ == "__main__":
    main()
