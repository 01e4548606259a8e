"""Log-probabilities of responses, and the DPO loss: values and gradients worked by hand."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import fill_adapter, quantize_model, random_tokens, tiny_llama

from dpo_minimal import loss
from dpo_minimal.lora import active_adapters, add_adapter
from dpo_minimal.loss import LOSSES, dpo_loss, sequence_logps, sft_loss, token_logps

same = partial(torch.testing.assert_close, rtol=0, atol=0)
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

# How often each token (column) follows each token (row) in a made-up corpus: the rows sum to
# 4, 5 and 10, so that P(1 | 0) = 2/4, P(2 | 1) = 1/5, P(0 | 2) = 7/10, P(2 | 2) = 1/10.
COUNTS = torch.tensor([[1.0, 2.0, 1.0], [3.0, 1.0, 1.0], [7.0, 2.0, 1.0]]).double()
BIGRAM = SimpleNamespace(
    hidden=lambda tokens, positions=None, mask=None: F.one_hot(tokens, 3).double(),
    lm_head=lambda hidden: hidden @ COUNTS.log(),
)


def masked(tokens, start, end=None):
    """A loss mask that scores the tokens start to end of each row, bool [B, T]."""
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[:, start:end] = True
    return mask


def bigram_logp(row, start, end=None):
    tokens = torch.tensor([row])
    return sequence_logps(BIGRAM, tokens, masked(tokens, start, end)).item()


def logps(*values):
    """Tensors [1] in float64 that take gradients."""
    return [torch.tensor([value]).double().requires_grad_() for value in values]


# Log-probabilities.


def test_the_log_prob_of_three_tokens_equals_the_hand_computed_one():
    # Prompt 1 0, answer 1 2 0: P(1 | 0) P(2 | 1) P(0 | 2) = 1/2 * 1/5 * 7/10
    assert bigram_logp([1, 0, 1, 2, 0], 2) == pytest.approx(math.log(0.07), abs=1e-10)


def test_prompt_tokens_are_not_scored():
    answers = [
        bigram_logp([*prompt, 0, 1, 2, 0], 4) for prompt in ([0, 0, 0], [2, 1, 2], [1, 2, 0])
    ]
    assert answers == [answers[0]] * 3


def test_another_answer_token_moves_the_log_prob_by_its_odds():
    change = bigram_logp([1, 0, 1, 2, 2], 2) - bigram_logp([1, 0, 1, 2, 0], 2)
    assert change == pytest.approx(math.log(1 / 7), abs=1e-10)  # P(2 | 2) / P(0 | 2)


def test_each_row_has_its_own_mask():
    tokens = torch.tensor([[1, 0, 1, 2, 0], [1, 0, 1, 2, 0]])  # the mask of one used for both shows
    mask = torch.cat((masked(tokens[:1], 2, 3), masked(tokens[1:], 3)))
    expected = [math.log(1 / 2), math.log(1 / 5 * 7 / 10)]
    assert sequence_logps(BIGRAM, tokens, mask).tolist() == pytest.approx(expected, abs=1e-10)


def test_padding_and_the_neighbours_in_the_batch_change_nothing():
    model, tokens = tiny_llama(), random_tokens(2, 7)
    alone = sequence_logps(model, tokens[:1], masked(tokens[:1], 3))
    padded = torch.cat((tokens[:1], torch.zeros(1, 50, dtype=torch.int64)), dim=1)
    longer = torch.cat((tokens[1:], random_tokens(1, 50, seed=4)), dim=1)
    batch, mask = torch.cat((padded, longer)), torch.cat((masked(padded, 3, 7), masked(longer, 9)))
    together = sequence_logps(model, batch, mask)
    close(together[0], alone[0])


def test_twice_the_answer_has_twice_the_log_prob():
    # The sum; a mean would be the same for both.
    assert bigram_logp([0] * 5, 2) == pytest.approx(3 * math.log(1 / 4), abs=1e-10)
    assert bigram_logp([0] * 8, 2) == pytest.approx(6 * math.log(1 / 4), abs=1e-10)


def test_a_row_without_scored_tokens_has_log_prob_zero():
    tokens = torch.tensor([[1, 0, 1], [0, 1, 2]])
    mask = torch.tensor([[False, False, False], [False, False, True]])
    assert sequence_logps(BIGRAM, tokens, mask).tolist() == pytest.approx([0, math.log(1 / 5)])


def test_log_probs_equal_a_numpy_log_softmax_of_all_logits():
    model, tokens = tiny_llama(), random_tokens(3, 8)
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, 0] = False
    logits = model(tokens).detach().numpy()
    expected = np.zeros(3)
    for b in range(3):
        for t in range(1, 8):
            if mask[b, t]:
                scores = logits[b, t - 1]
                expected[b] += scores[tokens[b, t]] - np.log(np.exp(scores).sum())
    actual = sequence_logps(model, tokens, mask).detach().numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-10)


def test_bfloat16_logits_go_through_a_float32_log_softmax():
    torch.manual_seed(0)
    hidden = torch.randn(1, 40, 16).to(torch.bfloat16)
    head = torch.nn.Linear(16, 500, bias=False).to(torch.bfloat16)
    head.weight.data *= 20
    model = SimpleNamespace(hidden=lambda tokens, positions=None, mask=None: hidden, lm_head=head)
    tokens = torch.randint(500, (1, 40))
    actual = token_logps(model, tokens, masked(tokens, 1))
    logits = head(hidden)[0, :-1].detach().double().numpy()
    picked = logits[np.arange(39), tokens[0, 1:].numpy()]
    expected = picked - np.log(np.exp(logits).sum(axis=1))
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-5)


def test_huge_logits_do_not_overflow():
    model = SimpleNamespace(
        hidden=BIGRAM.hidden, lm_head=lambda h: (h @ COUNTS.log() + 2000).float()
    )
    tokens = torch.tensor([[0, 1]])
    actual = sequence_logps(model, tokens, masked(tokens, 1)).item()
    assert actual == pytest.approx(math.log(1 / 2), abs=1e-3)  # 2,000 in float32 is +-1e-4


def test_the_sft_loss_is_one_value_per_scored_token_in_order():
    tokens = torch.tensor([[1, 0, 1, 2, 0], [0, 2, 2, 0, 0]])
    mask = torch.cat((masked(tokens[:1], 3), masked(tokens[1:], 2, 3)))
    expected = [math.log(5), math.log(10 / 7), math.log(10)]
    assert sft_loss(BIGRAM, tokens, mask).tolist() == pytest.approx(expected, abs=1e-10)


def test_the_sft_loss_of_packed_rows_is_that_of_separate_rows():
    model, first, second = tiny_llama(), random_tokens(1, 4), random_tokens(1, 5, seed=3)
    separate = [sft_loss(model, tokens, masked(tokens, 2)) for tokens in (first, second)]
    segments = torch.tensor([0] * 4 + [1] * 5)
    mask = (segments[:, None] == segments).tril()[None, None]  # [1, 1, T, T]
    positions = torch.tensor([[*range(4), *range(5)]])
    loss_mask = torch.cat((masked(first, 2), masked(second, 2)), dim=1)
    packed = sft_loss(model, torch.cat((first, second), dim=1), loss_mask, positions, mask)
    close(packed, torch.cat(separate))


def test_a_head_in_chunks_equals_one_call_in_value_and_gradient(monkeypatch):
    tokens, results, rows = random_tokens(3, 6), [], []
    for chunk in (1024, 4):
        monkeypatch.setattr(loss, "CHUNK", chunk)
        model = tiny_llama()
        model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        value = token_logps(model, tokens, masked(tokens, 3))
        assert rows[-3:] == ([9] if chunk == 1024 else [4, 4, 1])  # scored positions only
        (value * torch.arange(9)).sum().backward()
        results.append([value] + [p.grad for p in model.parameters()])
    for whole, chunked in zip(*results, strict=True):
        close(whole, chunked)


def test_autograd_keeps_no_logits_but_the_last_chunks(monkeypatch):
    # Of the 60 scored tokens, in chunks of 25: for the first two only the head's inputs are kept.
    monkeypatch.setattr(loss, "CHUNK", 25)
    model, tokens, kept = tiny_llama(), random_tokens(3, 21), []
    states = model.hidden(tokens)
    fixed = SimpleNamespace(hidden=lambda *_: states, lm_head=model.lm_head)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.shape) or t, lambda t: t
    )
    with hooks:
        token_logps(fixed, tokens, masked(tokens, 1))
    kept = [tuple(shape) for shape in kept]
    assert (25, 16) in kept and (10, 32) in kept
    assert (25, 32) not in kept and (60, 32) not in kept


# The DPO loss. Policy -1 and -4, reference -2 and -3: log-ratios 1 and -1, delta = 2.

BY_HAND = [  # kind, label smoothing, loss at beta = 0.1, d loss / d log pi(y_w)
    ("sigmoid", 0.0, math.log1p(math.exp(-0.2)), -0.1 / (1 + math.exp(0.2))),
    (
        "sigmoid",
        0.25,
        0.75 * math.log1p(math.exp(-0.2)) + 0.25 * math.log1p(math.exp(0.2)),
        -0.75 * 0.1 / (1 + math.exp(0.2)) + 0.25 * 0.1 / (1 + math.exp(-0.2)),
    ),
    ("ipo", 0.0, (2 - 5) ** 2, 2 * (2 - 5)),
    ("hinge", 0.0, 1 - 0.2, -0.1),
]


@pytest.mark.parametrize("kind, label_smoothing, value, gradient", BY_HAND)
def test_loss_and_gradient_of_each_kind_equal_the_hand_computed_ones(
    kind, label_smoothing, value, gradient
):
    policy_chosen, policy_rejected, *reference = logps(-1.0, -4.0, -2.0, -3.0)
    losses, _, _ = dpo_loss(policy_chosen, policy_rejected, *reference, 0.1, label_smoothing, kind)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([value], abs=1e-10)
    assert policy_chosen.grad.item() == pytest.approx(gradient, abs=1e-10)
    assert policy_rejected.grad.item() == pytest.approx(-gradient, abs=1e-10)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_rewards_are_beta_times_the_log_ratios_and_carry_no_gradient(beta):
    _, chosen, rejected = dpo_loss(*logps(-1.0, -4.0, -2.0, -3.5), beta)
    assert (chosen.item(), rejected.item()) == pytest.approx((beta * 1, beta * -0.5), abs=1e-10)
    assert not chosen.requires_grad and not rejected.requires_grad


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("delta", [-3.0, 0.0, 3.0])
def test_the_gradient_is_minus_beta_sigmoid_of_minus_beta_delta(beta, delta):
    policy_chosen, *others = logps(delta - 7.0, -5.0, -7.0, -5.0)
    dpo_loss(policy_chosen, *others, beta)[0].sum().backward()
    expected = -beta / (1 + math.exp(beta * delta))  # at delta = 0: beta / 2
    assert policy_chosen.grad.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("kind", LOSSES)
def test_swapping_the_pair_negates_the_initial_gradient(kind):
    # Both answers as likely as under the reference: the gradient on each flips with its role.
    a, b = logps(-5.0, -9.0)
    reference = a.detach(), b.detach()
    losses = dpo_loss(a, b, *reference, 0.1, kind=kind)[0]
    plain = torch.autograd.grad(losses.sum(), (a, b))
    losses = dpo_loss(b, a, *reversed(reference), 0.1, kind=kind)[0]
    swapped = torch.autograd.grad(losses.sum(), (a, b))
    assert plain[0] < 0 < plain[1]  # the chosen one's probability must rise
    assert [-g for g in plain] == list(swapped)


@pytest.mark.parametrize("kind", LOSSES)
def test_an_equal_shift_of_both_log_ratios_leaves_the_loss_alone(kind):
    before = dpo_loss(*logps(-1.0, -4.0, -2.0, -3.0), 0.1, kind=kind)[0]
    policy = dpo_loss(*logps(-11.0, -14.0, -2.0, -3.0), 0.1, kind=kind)[0]
    reference = dpo_loss(*logps(-1.0, -4.0, -22.0, -23.0), 0.1, kind=kind)[0]
    assert before.item() == pytest.approx(policy.item(), abs=1e-10)
    assert before.item() == pytest.approx(reference.item(), abs=1e-10)


def test_full_label_noise_has_its_minimum_at_delta_zero():
    policy_chosen, *others = logps(-5.0, -5.0, -5.0, -5.0)
    dpo_loss(policy_chosen, *others, 0.1, label_smoothing=0.5)[0].sum().backward()
    assert policy_chosen.grad.item() == 0


def test_the_hinge_is_flat_beyond_its_margin():
    policy_chosen, *others = logps(-1.0, -40.0, -2.0, -3.0)  # beta * delta = 3.8
    losses = dpo_loss(policy_chosen, *others, 0.1, kind="hinge")[0]
    losses.sum().backward()
    assert (losses.item(), policy_chosen.grad.item()) == (0, 0)


def test_extreme_margins_stay_finite():
    # log(sigmoid(x)) as two calls is -inf below -104 in float32.
    policy_chosen = torch.tensor([-9000.0, -1000.0], requires_grad=True)
    other = torch.tensor([-5000.0, -5000.0])
    losses, _, _ = dpo_loss(policy_chosen, other, other, other, 0.1)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([400, 0])
    assert policy_chosen.grad.tolist() == pytest.approx([-0.1, 0])


def test_losses_and_rewards_are_one_value_per_pair():
    values = [torch.randn(3, generator=torch.Generator().manual_seed(i)).double() for i in range(4)]
    together = dpo_loss(*values, 0.1)
    for i in range(3):
        alone = dpo_loss(*(v[i : i + 1] for v in values), 0.1)
        assert [t[i].item() for t in together] == pytest.approx(
            [t.item() for t in alone], abs=1e-10
        )


@pytest.mark.parametrize(
    "kind, label_smoothing",
    [("simpo", 0.0), ("Hinge", 0.0), ("", 0.0), ("ipo", 0.1), ("hinge", 0.1)],
)
def test_a_loss_that_does_not_exist_is_refused(kind, label_smoothing):
    with pytest.raises(ValueError, match=f"{kind!r} with label smoothing {label_smoothing}"):
        dpo_loss(*logps(-1.0, -4.0, -2.0, -3.0), 0.1, label_smoothing, kind)


def test_a_new_entry_of_the_table_is_what_the_dpo_loss_computes(monkeypatch):
    def cubed(delta, beta, label_smoothing):
        return beta * delta**3 + label_smoothing

    monkeypatch.setitem(LOSSES, "cubed", cubed)
    losses, *rewards = dpo_loss(*logps(-1.0, -4.0, -2.0, -3.0), 0.25, kind="cubed")
    assert losses.tolist() == [0.25 * 2**3]  # delta = 2
    assert [reward.item() for reward in rewards] == [0.25, -0.25]
    with pytest.raises(ValueError, match="'cubed' with label smoothing 0.1"):
        dpo_loss(*logps(-1.0, -4.0, -2.0, -3.0), 0.25, 0.1, "cubed")


# Step 0 of a run.


@pytest.mark.parametrize("label_smoothing", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_at_step_0_is_ln_2_to_the_last_bit(dtype, label_smoothing):
    model = quantize_model(tiny_llama(dtype))
    add_adapter(model, "sft", r=2, dropout=0.1, targets="all")
    fill_adapter(model, "sft")
    add_adapter(model, "dpo", r=2, targets="all")
    tokens = random_tokens(4, 9)  # two chosen rows, two rejected ones
    policy = sequence_logps(model, tokens, masked(tokens, 4))
    with torch.no_grad(), active_adapters(model, ["sft"]):
        reference = sequence_logps(model, tokens, masked(tokens, 4))
    assert policy.dtype == torch.float32
    same(policy.detach(), reference)
    losses, *rewards = dpo_loss(*policy.split(2), *reference.split(2), 0.1, label_smoothing)
    same(losses.detach(), torch.log(torch.tensor([2.0, 2.0])))
    assert [reward.tolist() for reward in rewards] == [[0, 0], [0, 0]]
