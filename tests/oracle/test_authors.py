"""The loss against the formulas that the DPO authors published with their code.

As in `preference_loss` and `_get_batch_logps` of eric-mitchell/direct-preference-optimization
(trainers.py), written here from the papers in NumPy float64: log-ratios of policy and reference
first, where ours takes those of chosen and rejected. No library is needed, so nothing is skipped.
"""

import numpy as np
import pytest
import torch
from helpers import random_tokens, tiny_llama

from dpo_minimal.loss import dpo_loss, sequence_logps


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def published_loss(pc, pr, rc, rr, beta, label_smoothing=0.0, ipo=False):
    """(losses, chosen rewards, rejected rewards): Rafailov et al. eq. 7, Mitchell 2023, Azar et al.

    Policy and reference log-probabilities of chosen and rejected answers, float64 [n].
    """
    logits = (pc - pr) - (rc - rr)
    if ipo:
        losses = (logits - 1 / (2 * beta)) ** 2
    else:
        flipped = label_smoothing * log_sigmoid(-beta * logits)
        losses = -(1 - label_smoothing) * log_sigmoid(beta * logits) - flipped
    return losses, beta * (pc - rc), beta * (pr - rr)


def random_logps(n=2000):
    """Four arrays of summed log-probabilities, float64 [n], some ratios far out."""
    rng = np.random.default_rng(0)
    reference = rng.uniform(-400, -1, size=(2, n))
    policy = reference + rng.normal(size=(2, n)) * 10 ** rng.uniform(-3, 2.5, size=n)
    return *policy, *reference


CASES = [("sigmoid", 0.0), ("sigmoid", 0.1), ("sigmoid", 0.5), ("ipo", 0.0)]


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 3.0])
@pytest.mark.parametrize(("kind", "label_smoothing"), CASES)
def test_losses_and_rewards_are_the_published_ones(kind, label_smoothing, beta):
    inputs = random_logps()
    options = {"beta": beta, "label_smoothing": label_smoothing}
    expected = published_loss(*inputs, **options, ipo=kind == "ipo")
    found = dpo_loss(*map(torch.from_numpy, inputs), **options, kind=kind)
    # The order of subtraction differs: a rounding of 800 in float64 is 1e-13; IPO squares it.
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (2000,)
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "label_smoothing"), CASES)
def test_float32_losses_are_the_published_ones_to_rounding(kind, label_smoothing):
    inputs = [values.astype(np.float32) for values in random_logps()]
    exact = [values.astype(np.float64) for values in inputs]
    options = {"beta": 0.1, "label_smoothing": label_smoothing}
    expected, _, _ = published_loss(*exact, **options, ipo=kind == "ipo")
    found, _, _ = dpo_loss(*map(torch.from_numpy, inputs), **options, kind=kind)
    assert found.dtype == torch.float32
    # delta is a difference of numbers up to 1,000: absolute error 2^-24 * 1000 = 6e-5 a rounding.
    slope = 2 * np.sqrt(expected) if kind == "ipo" else 0.1
    allowed = 4 * 6e-5 * slope + 1e-6 * expected + 1e-6
    np.testing.assert_array_less(np.abs(found.numpy() - expected), allowed)


def test_the_gradient_is_the_derivative_of_the_published_loss():
    inputs, step = random_logps(50), 1e-5
    tensors = [torch.from_numpy(values).requires_grad_() for values in inputs]
    dpo_loss(*tensors, beta=0.3, label_smoothing=0.2)[0].sum().backward()
    for i, tensor in enumerate(tensors):
        shifted = [list(inputs), list(inputs)]
        for values, sign in zip(shifted, (1, -1), strict=True):
            values[i] = values[i] + sign * step
        up, down = (published_loss(*v, 0.3, 0.2)[0] for v in shifted)
        np.testing.assert_allclose(tensor.grad.numpy(), (up - down) / (2 * step), atol=1e-7)


def test_a_response_s_log_probability_is_the_published_sum():
    model, tokens = tiny_llama(), random_tokens(5, 12)
    mask = torch.zeros(5, 12, dtype=torch.bool)
    for row, (start, end) in enumerate([(1, 12), (3, 7), (11, 12), (1, 2), (6, 10)]):
        mask[row, start:end] = True
    logits = model(tokens)[:, :-1].detach().numpy()
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    labels, scored = tokens[:, 1:].numpy(), mask[:, 1:].numpy()
    chosen = np.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    expected = (chosen * scored).sum(axis=-1)
    np.testing.assert_allclose(sequence_logps(model, tokens, mask).detach(), expected, rtol=1e-12)
