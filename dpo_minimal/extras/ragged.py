"""Attention on a GPU without the mask: texts that share a row are laid end to end instead.

With a mask, a GPU's kernel computes all T x T products and drops those that the mask forbids; for
pairs that share a prompt that is 2.6 times what is needed. A kernel for texts of any lengths
(Dao 2023, arXiv:2307.08691) computes only these, and no pads.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F

from dpo_minimal.extras.reading import first_line

LARGEST_HEAD = 256  # that the kernel has been written for


def mask_for(mask, positions: list[list[int]], device):
    """What `Attention` is given as a mask: on a GPU one that brings its own kernel, else the mask.

    So it is where there is a kernel. It is tried here, and not at its first use, which may be
    inside of a checkpoint or a compiled block.

    mask bool [B, 1, T, T]; positions: those of each row, without pads. They must say the same: a
    run of consecutive positions is a text, which sees itself, causally; one that begins at position
    p is an answer, and also sees the first p tokens of its row.
    """
    device = torch.device(device)
    attend = kernel(device) if device.type == "cuda" else None
    return mask if attend is None else Ragged(mask, positions, device, attend)


class Ragged:
    """A mask, and the same as places of the texts in their rows.

    Handed to `F.scaled_dot_product_attention` as a mask, it computes the result itself: torch asks
    arguments that have a `__torch_function__`. S texts, N queries and M keys of all texts together.
    attend: the kernel.
    """

    def __init__(self, mask, positions: list[list[int]], device, attend):
        queries, keys = [], []  # (row, place) of each token, text after text
        query_ends, key_ends = [0], [0]
        for row, start, end, first in texts_of(positions):
            queries += [(row, place) for place in range(start, end)]
            keys += [(row, place) for place in (*range(first), *range(start, end))]
            query_ends.append(len(queries))
            key_ends.append(len(keys))
        self.mask, self.attend = mask, attend
        self.queries = torch.tensor(queries, device=device).unbind(1)  # rows [N], places [N]
        self.keys = torch.tensor(keys, device=device).unbind(1)  # rows [M], places [M]
        self.query_ends = torch.tensor(query_ends, dtype=torch.int32, device=device)  # [S + 1]
        self.key_ends = torch.tensor(key_ends, dtype=torch.int32, device=device)  # [S + 1]
        self.longest = (longest(query_ends), longest(key_ends))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        q, k, v, ragged = args
        if fits(q):
            return ragged.attention(q, k, v)
        return func(q, k, v, ragged.mask, **(kwargs or {}))

    def attention(self, q, k, v):
        """Attention of texts laid end to end; q, k, v and the result [B, H, T, K], 0 at pads."""
        (q_rows, q_places), (k_rows, k_places) = self.queries, self.keys
        y = self.attend(
            q[q_rows, :, q_places],  # [N, H, K]
            k[k_rows, :, k_places],  # [M, H, K]
            v[k_rows, :, k_places],  # [M, H, K]
            self.query_ends,
            self.key_ends,
            *self.longest,
            window_size=(-1, 0),  # causal: a text's last query sees the last of its keys
        )
        B, H, T, K = q.shape
        rows = q.new_zeros(B, T, H, K)
        rows[q_rows, q_places] = y
        return rows.transpose(1, 2)


def texts_of(positions: list[list[int]]):
    """Yield (row, start, end, first position) of each text: start and end are places in the row."""
    for row, of_row in enumerate(positions):
        starts = [i for i, p in enumerate(of_row) if i == 0 or p != of_row[i - 1] + 1]
        for start, end in zip(starts, [*starts[1:], len(of_row)], strict=True):
            yield row, start, end, of_row[start]


def longest(ends: list[int]) -> int:
    """The length of the longest text."""
    return max(end - start for start, end in zip(ends, ends[1:], strict=False))


def fits(q) -> bool:
    """Whether the kernel has been written for such queries, [B, H, T, K]."""
    head = q.shape[-1]
    return q.dtype.itemsize == 2 and head % 8 == 0 and head <= LARGEST_HEAD


@cache
def kernel(device: torch.device):
    """torch's kernel for texts laid end to end; None, after a line that says so, if it is wrong.

    It is tried on two rows first: no machine that this was written on has a GPU.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn

        difference = largest_difference(varlen_attn, device)
    except Exception as error:  # of torch, the driver, a library: of any class
        varlen_attn, difference = None, first_line(error)[:80]
    if varlen_attn is None or not difference < 0.03:  # some roundings to bfloat16's 8 bits
        print(f"warning   attention computes what the mask forbids too ({difference})", flush=True)
        return None
    return varlen_attn


@torch.enable_grad()
def largest_difference(attend, device) -> float:
    """Between a kernel's results and gradients and those of masked attention, relative to these.

    Tried on two rows: one of a prompt and two answers, one of two packed texts and pads. They are
    longer than the tiles that a kernel works in, and heads have Llama 2's size.
    """
    positions = [[*range(200), *range(70, 170)], [*range(130), *range(90)]]
    T = max(map(len, positions))
    sees = torch.zeros(2, 1, T, T, dtype=torch.bool)
    for row, start, end, first in texts_of(positions):
        for place in range(start, end):
            sees[row, 0, place, [*range(first), *range(start, place + 1)]] = True
    pads = slice(len(positions[1]), T)
    sees[1, 0, pads, 0] = True  # a query must see something
    ragged = Ragged(sees.to(device), positions, device, attend)
    generator = torch.Generator().manual_seed(0)
    q, k, v, up = torch.randn(4, 2, 2, T, 128, generator=generator).to(device, torch.bfloat16)
    up[1, :, pads] = 0
    found = []
    for attention in (ragged.attention, partial(masked, ragged.mask)):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        y = attention(*inputs)
        found.append([y.detach() * (up != 0), *torch.autograd.grad(y, inputs, up)])
    pairs = zip(*found, strict=True)
    differences = [(ours - right).abs().max() / right.abs().max() for ours, right in pairs]
    return float(torch.stack(differences).max())  # NaN if any is


def masked(mask, q, k, v):
    """Attention as `Attention` computes it with a mask."""
    return F.scaled_dot_product_attention(q, k, v, mask)
