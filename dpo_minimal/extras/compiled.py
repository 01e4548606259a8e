"""Forms of a computation that a compiler makes fast, and whether there is a compiler."""

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dpo_minimal import InputError
from dpo_minimal.extras.reading import first_line


def check_compiler(device: str):
    """InputError if torch.compile does not work here: it needs a C++ compiler, or Triton."""
    # A block has 9 forms: the first one, the others, without gradients; each by length, by rows.
    # Torch's limit of 8 would leave some of them uncompiled, and only warn.
    torch._dynamo.config.recompile_limit = 64
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise InputError(f"--compile: torch cannot compile here, leave it out ({reason})") from None


def on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A constant table on a device, copied there once: for each copy the host waits for a GPU."""
    return table.to(device) if torch.compiler.is_compiling() else kept_copy(table, device)


@functools.cache
def kept_copy(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """See `on_device`. Apart from it, because a compiler warns of functions with a cache."""
    return table.to(device)


def fused_form(device: torch.device):
    """`dequantize_fused` where a compiler makes it one pass; None where it would be slower."""
    if torch.compiler.is_compiling():
        return dequantize_fused
    return compiled_dequantize(device) if device.type == "cuda" else None


@functools.cache
def compiled_dequantize(device: torch.device):
    """`dequantize_fused`, compiled for a device; None, after a line that says so, if that fails.

    On a GPU it reads and writes 2.6 bytes per weight in one kernel, where pieces take 29 in 13.
    """
    try:
        fused = torch.compile(dequantize_fused, dynamic=True)
        packed = torch.zeros(4, 32, dtype=torch.uint8, device=device)
        fused(packed, torch.ones(4, device=device), torch.bfloat16, [float(i) for i in range(16)])
    except Exception as error:  # of Triton, the C compiler, the driver: of any class
        reason = first_line(error)[:80]
        print(f"warning   no compiler for the GPU, 4-bit layers are slower ({reason})", flush=True)
        return None
    return fused


def linear_recomputed(x, make_weight):
    """x @ W^T with W = make_weight(x.dtype), which backward makes again.

    A compiler sees that `NF4Matmul` makes W twice, and would keep the first one for both.
    """
    return F.linear(x, checkpoint(make_weight, x.dtype, use_reentrant=False))


def dequantize_fused(packed, absmax, dtype: torch.dtype, code: list[float]):
    """What `nf4.dequantize_nf4` computes, in a form that a compiler fuses into a single pass.

    packed uint8 [blocks, block_size / 2], absmax float32 [blocks], code: the 16 NF4 values ->
    dtype [blocks, block_size].
    """
    index = packed.int()
    high = select_code(index >> 4, code) * absmax[:, None]
    low = select_code(index & 15, code) * absmax[:, None]
    if dtype != torch.bfloat16:
        return torch.stack((high, low), dim=2).flatten(1).to(dtype)
    # Both halves of an int32 are filled at once: a vector of those takes one store, where
    # alternating elements would be stored one by one.
    high, low = bfloat16_bits(high), bfloat16_bits(low)
    return (high & 0xFFFF | low << 16).view(torch.bfloat16)


def bfloat16_bits(x):
    """float32 rounded to bfloat16 (to nearest, ties to even), as an int32 with those 16 bits."""
    bits = x.view(torch.int32)
    last_kept_bit = (bits >> 16) & 1
    return (bits + 0x7FFF + last_kept_bit) >> 16


def select_code(index, code: list[float]):
    """code[index], int32 to float32, by a tree of selections on the index's four bits.

    A processor's vector units compare and select 16 values at once, but look up a table one by one.
    """
    values = code
    for bit in (1, 2, 4, 8):
        odd = (index & bit) != 0
        values = [torch.where(odd, values[i + 1], values[i]) for i in range(0, len(values), 2)]
    return values[0]
