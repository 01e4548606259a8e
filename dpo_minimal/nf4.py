"""NF4: weights in 4 bits. The code, blockwise and double quantization, the 4-bit linear layer.

From QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3), bit for bit as in bitsandbytes.
A weight is cut into blocks of 64; each block is divided by its largest magnitude (absmax), and each
quotient becomes the index of the nearest of 16 codes. Two indices share a byte. Double quantization
then stores each float32 absmax in 8 bits, in blocks of 256: 4 + 8/64 + 32/(64 * 256) = 4.127 bits
per weight in all.
"""

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import nn

from dpo_minimal.extras.compiled import fused_form, linear_recomputed, on_device

ABSMAX_BLOCK = 256  # absmax values that share one scale in double quantization
PIECE = 2**18  # weights taken at a time on a CPU: temporary tensors stay in its cache
GPU_PIECE = 2**24  # on a GPU: few kernels, and 0.1 GB of temporary tensors instead of 0.4 for 7B


def linspace32(start: float, end: float, n: int) -> torch.Tensor:
    """torch.linspace in float32, with the same last bits on every processor.

    Each half is counted from its own end; torch's own kernels differ in how they round this.
    """
    i = torch.arange(n)
    first, last = torch.tensor([start, end]).double()
    step = ((last - first).float() / (n - 1)).double()
    return torch.where(i < n // 2, first + step * i, last - step * (n - 1 - i)).float()


def nf4_code() -> torch.Tensor:
    """The 16 NF4 values in ascending order, float32 [16], in [-1, 1] (QLoRA, eq. 4 and appendix E).

    Quantiles of the standard normal: 8 at evenly spaced probabilities above one half, 7 below it,
    and an exact zero. The outermost probability leaves out the mean of 1/32 and 1/30 of the mass.
    """
    # 1 - (1/32 + 1/30)/2 to the seven digits of the published code, spaced in float32 as there: the
    # full fraction, or float64 spacing, gives codes that are a few units in the last place off.
    outermost = 0.9677083
    above = linspace32(outermost, 0.5, 9)[:-1].tolist()
    below = linspace32(outermost, 0.5, 8)[:-1].tolist()
    quantile = NormalDist().inv_cdf
    values = [quantile(p) for p in above] + [0.0] + [-quantile(p) for p in below]
    code = torch.tensor(sorted(values))
    return code / code.max()


def dynamic_code() -> torch.Tensor:
    """The 256 values for 8-bit absmax, ascending, float32 [256]: a signed dynamic map.

    For each decade 10^-6 to 1, the midpoints of 2^i equal steps from 0.1 to 1: fine near zero,
    coarse near one (Dettmers et al. 2022, arXiv:2110.02861, section 1.3).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = linspace32(0.1, 1, 2**i + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values))


NF4_CODE = nf4_code()
NF4_VALUES = NF4_CODE.tolist()  # the same for a compiler, which cannot read a tensor's values
DYNAMIC_CODE = dynamic_code()


def nearest(values: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """The index of the nearest entry of an ascending code, uint8; halfway goes to the lower one."""
    midpoints = (code[:-1] + code[1:]) / 2
    if len(code) > 16:
        return torch.bucketize(values, midpoints, out_int32=True).to(torch.uint8)
    # On a CPU, 15 vectorized comparisons are faster than a binary search for each value.
    index = torch.zeros_like(values, dtype=torch.uint8)
    for midpoint in midpoints.tolist():
        index += values > midpoint
    return index


def scaled_blocks(values: torch.Tensor, block_size: int):
    """float32 [n] to blocks scaled into [-1, 1], [blocks, block_size], and absmax [blocks]."""
    blocks = F.pad(values, (0, -len(values) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    # The reciprocal first, as in bitsandbytes: it decides some roundings. It is kept finite, so
    # that zeros stay zeros.
    inverse = 1 / absmax.clamp(min=1e-38)
    return blocks * inverse[:, None], absmax


@dataclass(frozen=True)
class NF4Weight:
    """A quantized weight of n elements, in blocks over its row-major order.

    packed: uint8 [ceil(n/2)], the first element of each pair in the high nibble. Either `absmax`
    float32 [blocks], or with double quantization `absmax_codes` uint8 [blocks], `absmax_scale`
    float32 [ceil(blocks/256)] and `absmax_offset` float32 []. `dtype`: what dequantizing returns.
    """

    packed: torch.Tensor
    shape: tuple
    dtype: torch.dtype
    block_size: int = 64
    absmax: torch.Tensor | None = None
    absmax_codes: torch.Tensor | None = None
    absmax_scale: torch.Tensor | None = None
    absmax_offset: torch.Tensor | None = None


def piece_size(device: torch.device) -> int:
    """How many weights to take at a time on a device."""
    return PIECE if device.type == "cpu" else GPU_PIECE


def quantize_nf4(weight: torch.Tensor, block_size: int = 64, double_quant: bool = True):
    """Quantize a float tensor of any shape to an NF4Weight (QLoRA, eq. 1, sec. 3). Even blocks."""
    values = weight.detach().flatten()
    piece = piece_size(values.device) // block_size * block_size  # whole blocks
    parts = [quantize_piece(part, block_size) for part in values.split(piece)]
    packed, absmax = map(torch.cat, zip(*parts, strict=True))
    shape = tuple(weight.shape)
    if not double_quant:
        return NF4Weight(packed, shape, weight.dtype, block_size, absmax=absmax)
    # Absmax is positive: taking off the mean centres it on the signed map's fine part.
    offset = absmax.mean()
    scaled, scale = scaled_blocks(absmax - offset, ABSMAX_BLOCK)
    codes = nearest(scaled, on_device(DYNAMIC_CODE, scaled.device))
    return NF4Weight(
        packed,
        shape,
        weight.dtype,
        block_size,
        absmax_codes=codes.flatten()[: len(absmax)],
        absmax_scale=scale,
        absmax_offset=offset,
    )


def quantize_piece(values: torch.Tensor, block_size: int):
    """Some values [n] as (packed uint8 [ceil(n/2)], absmax float32 [blocks])."""
    values = values.to(torch.float32)  # exact; never through another 16-bit type
    scaled, absmax = scaled_blocks(values, block_size)
    codes = nearest(scaled, NF4_CODE).flatten()[: len(values)]  # uint8 [n]
    codes = F.pad(codes, (0, len(codes) % 2))
    return codes[0::2] << 4 | codes[1::2], absmax


def dequantize_absmax(quantized: NF4Weight) -> torch.Tensor:
    """Each block's absmax, float32 [blocks], undoing double quantization where there is one."""
    if quantized.absmax is not None:
        return quantized.absmax
    codes = quantized.absmax_codes
    values = on_device(DYNAMIC_CODE, codes.device).index_select(0, codes.int())
    scale = quantized.absmax_scale.repeat_interleave(ABSMAX_BLOCK)[: len(codes)]
    return values * scale + quantized.absmax_offset


@functools.cache
def code_pairs(device: torch.device) -> torch.Tensor:
    """int64 [256]: the bits of the two float32 codes of each byte, so one lookup gives both."""
    byte = torch.arange(256)
    pairs = torch.stack((NF4_CODE[byte >> 4], NF4_CODE[byte & 15]), dim=1)  # [256, 2]
    return pairs.view(torch.int64).flatten().to(device)


def dequantize_nf4(quantized: NF4Weight) -> torch.Tensor:
    """The weight back, in its own shape and dtype: code * absmax in float32, then one cast.

    It works piece by piece, so that temporary tensors stay in a CPU's cache. On CUDA and under
    torch.compile, `fused_form` gives the same bits in one pass.
    """
    absmax = dequantize_absmax(quantized)  # [blocks]
    packed, half = quantized.packed, quantized.block_size // 2
    if len(packed) < len(absmax) * half:  # the last block is a partial one
        packed = F.pad(packed, (0, len(absmax) * half - len(packed)))
    packed = packed.view(-1, half)  # [blocks, block_size / 2]
    if fused := fused_form(packed.device):
        blocks = fused(packed, absmax, quantized.dtype, NF4_VALUES)
    else:
        blocks = packed.new_empty(len(absmax), quantized.block_size, dtype=quantized.dtype)
        piece = piece_size(packed.device) // quantized.block_size
        tables = code_pairs(packed.device).expand(piece, -1)  # the same one for each block
        for at in range(0, len(absmax), piece):
            span = slice(at, at + piece)
            pairs = tables.gather(1, packed[span].long())  # int64 [piece, block_size / 2]
            blocks[span] = pairs.view(torch.float32).mul_(absmax[span, None])
    return blocks.flatten()[: math.prod(quantized.shape)].view(quantized.shape)


class NF4Matmul(torch.autograd.Function):
    """x @ W^T for a frozen quantized W [out, in]; x [..., in].

    Backward needs W once more: grad_x = grad_y @ W. Autograd on its own would keep every layer's
    dequantized W until backward (13 GB for 7B), so we keep W packed and dequantize it again.
    """

    @staticmethod
    def forward(ctx, x, quantized):
        ctx.quantized = quantized
        return F.linear(x, dequantize_nf4(quantized).to(x.dtype))

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ dequantize_nf4(ctx.quantized).to(grad_y.dtype), None


class NF4Linear(nn.Module):
    """A linear layer without bias whose frozen weight [out, in] is kept in NF4.

    The weight dequantizes to its `dtype` and is then cast to the input's, as in bitsandbytes.
    """

    TENSORS = ("packed", "absmax", "absmax_codes", "absmax_scale", "absmax_offset")

    def __init__(self, quantized: NF4Weight):
        super().__init__()
        self.keep_weight = False  # see `keep_weights`
        self.out_features, self.in_features = quantized.shape
        self.block_size, self.dtype = quantized.block_size, quantized.dtype
        for name in self.TENSORS:
            self.register_buffer(name, getattr(quantized, name))

    @property
    def quantized(self) -> NF4Weight:
        """The layer's weight as an NF4Weight that shares its memory."""
        tensors = {name: getattr(self, name) for name in self.TENSORS}
        shape = (self.out_features, self.in_features)
        return NF4Weight(shape=shape, dtype=self.dtype, block_size=self.block_size, **tensors)

    def forward(self, x):  # [..., in] -> [..., out]
        if self.keep_weight:
            return F.linear(x, self.dequantized(x.dtype))
        if torch.compiler.is_compiling():
            return linear_recomputed(x, self.dequantized)  # a compiler would keep NF4Matmul's W
        return NF4Matmul.apply(x, self.quantized)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight for one use, [out, in] in `dtype`."""
        return dequantize_nf4(self.quantized).to(dtype)

    def _apply(self, fn, recurse=True):
        # The buffers follow to a device, but never to another dtype: a bfloat16 absmax is wrong.
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)


def keep_weights(model: nn.Module, keep: bool):
    """Whether autograd saves the dequantized W of each 4-bit layer; for gradient checkpointing.

    There a block runs forward again right before it runs backward. Saving W in between dequantizes
    it once instead of twice, and the W's of only one block are held at a time.
    """
    for layer in model.modules():
        if isinstance(layer, NF4Linear):
            layer.keep_weight = keep
