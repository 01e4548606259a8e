"""Attention of texts laid end to end gives what attention with the mask gives.

The kernel runs on GPUs only. A loop over the texts stands in for it: what is tested is all around
it, and that a kernel with another idea of "causal" is noticed.
"""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_llama

from dpo_minimal.batches import packed_batch, pair_batch
from dpo_minimal.data import EncodedPair
from dpo_minimal.extras import ragged
from dpo_minimal.loss import preference_logps, sft_loss

CPU = torch.device("cpu")
PAIRS = [
    EncodedPair([1, 2, 3], [4, 5, 6], [7, 8]),
    EncodedPair([1, 2], [4], [7, 8, 3, 9]),
    EncodedPair([1, 9, 9, 9], [2], [2]),
]
TEXTS = [([1, 2], [3, 4, 5]), ([1], [7]), ([6, 6, 6, 6], [2, 1])]


def text_by_text(q, k, v, query_ends, key_ends, max_q, max_k, window_size, shift=None):
    """What the kernel computes, [N, H, K], a text at a time. shift: of another "causal"."""
    y = []
    for s in range(len(query_ends) - 1):
        queries = slice(*query_ends[s : s + 2].tolist())
        keys = slice(*key_ends[s : s + 2].tolist())
        N, M = len(q[queries]), len(k[keys])
        assert max_q >= N and max_k >= M and window_size == (-1, 0)
        sees = torch.ones(N, M, dtype=torch.bool).tril(M - N if shift is None else shift)
        heads = [t.transpose(0, 1) for t in (q[queries], k[keys], v[keys])]  # [H, N or M, K]
        y.append(F.scaled_dot_product_attention(*heads, sees).transpose(0, 1))
    return torch.cat(y)


@pytest.fixture
def end_to_end(monkeypatch):
    """From now on batches are laid end to end on the CPU as well; returns a list of the calls."""
    calls = []

    def attend(*args, **kwargs):
        calls.append(args)
        return text_by_text(*args, **kwargs)

    def switch_on():
        monkeypatch.setattr(ragged, "mask_for", partial(ragged.Ragged, attend=attend))
        monkeypatch.setattr(ragged, "fits", lambda q: True)  # float64 too
        return calls

    return switch_on


def pair_sums(model):
    """log pi of both answers of each pair, [2, B]."""
    return torch.stack(preference_logps(model, pair_batch(PAIRS, [0, 1, 2], "cpu")))


def packed_losses(model):
    """The loss of each scored token of two packed rows."""
    batch = packed_batch(TEXTS, [[0, 1], [2]], "cpu")
    return sft_loss(model, batch.tokens, batch.loss_mask, batch.positions, batch.mask)


@pytest.mark.parametrize("compute", [pair_sums, packed_losses])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_are_those_of_the_mask(end_to_end, compute, checkpointing):
    model = tiny_llama()  # float64
    model.gradient_checkpointing = checkpointing

    def values_and_gradients():
        model.zero_grad()
        values = compute(model)
        values.square().sum().backward()
        return [values.detach(), *(p.grad for p in model.parameters())]

    masked = [t.clone() for t in values_and_gradients()]
    calls = end_to_end()
    laid_out = values_and_gradients()
    for ours, right in zip(laid_out, masked, strict=True):
        assert torch.allclose(ours, right, rtol=1e-11, atol=1e-12)
    layers = model.config.num_hidden_layers
    assert len(calls) == layers * (2 if checkpointing else 1)


def test_only_the_products_that_the_mask_allows_are_computed(end_to_end):
    calls = end_to_end()
    pair_sums(tiny_llama())
    q, k, _, query_ends, key_ends, max_q, max_k = calls[0]
    # Chosen: 6, 3, 5 tokens. Rejected: 2, 4, 1 queries, which see 5, 6, 5 keys. No pads.
    assert query_ends.tolist() == [0, 6, 8, 11, 15, 20, 21]
    assert key_ends.tolist() == [0, 6, 11, 14, 20, 25, 30]
    assert (len(q), len(k), max_q, max_k) == (21, 30, 6, 6)


@pytest.fixture
def chosen(monkeypatch):
    """A function: whether `kernel` takes this one as torch's."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(ragged, "kernel", cache(ragged.kernel.__wrapped__))

    def taken(attend):
        ragged.kernel.cache_clear()
        monkeypatch.setattr(varlen, "varlen_attn", attend)
        return ragged.kernel(CPU) is attend

    return taken


def test_a_right_kernel_is_taken_and_another_idea_of_causal_is_not(chosen, capsys):
    with torch.no_grad():  # an evaluation may come first
        assert chosen(text_by_text)
    assert capsys.readouterr().out == ""
    from_the_top = partial(text_by_text, shift=0)  # a text's first query sees the first key only
    assert not chosen(from_the_top)
    assert "warning   attention computes what the mask forbids too (1." in capsys.readouterr().out


class Broken(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_kernel_with_a_broken_gradient_is_not_taken(chosen, which):
    def attend(*args, **kwargs):
        args = [Broken.apply(t) if i == which else t for i, t in enumerate(args)]
        return text_by_text(*args, **kwargs)

    assert not chosen(attend)


def test_where_there_is_no_kernel_that_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(ragged, "kernel", cache(ragged.kernel.__wrapped__))
    assert ragged.kernel(CPU) is None  # flash attention is not for CPUs
    assert capsys.readouterr().out.startswith("warning   attention computes what the mask forbids")
    assert ragged.kernel(CPU) is None
    assert capsys.readouterr().out == ""


def test_where_the_kernel_does_not_fit_the_mask_is_used():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    q, k, v = torch.randn(3, 1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    laid_out = ragged.Ragged(mask, [[0, 1, 2]], CPU, attend=None)  # which cannot be called
    found = F.scaled_dot_product_attention(q, k, v, laid_out)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.parametrize(
    ("dtype", "head", "expected"),
    [(torch.bfloat16, 64, True), (torch.float16, 128, True), (torch.float32, 64, False)]
    + [(torch.bfloat16, 12, False), (torch.bfloat16, 512, False)],
)
def test_the_kernel_is_for_16_bits_and_usual_heads(dtype, head, expected):
    assert ragged.fits(torch.empty(1, 1, 1, head, dtype=dtype)) is expected


def test_masks_are_kept_but_on_a_gpu(monkeypatch):
    mask, cuda = torch.ones(1, 1, 2, 2, dtype=torch.bool), torch.device("cuda:1")
    monkeypatch.setattr(ragged, "Ragged", lambda *given: given)
    for found in ("a kernel", None):
        monkeypatch.setattr(ragged, "kernel", {cuda: found}.get)
        for device in ("cpu", CPU):
            assert ragged.mask_for(mask, [[0, 1]], device) is mask
        on_gpu = ragged.mask_for(mask, [[0, 1]], "cuda:1")
        if found:
            assert on_gpu[0] is mask and on_gpu[1:] == ([[0, 1]], cuda, found)
        else:
            assert on_gpu is mask
