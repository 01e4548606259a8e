"""Where the losses lead: on a finite set of answers their minimum is known in closed form.

The policy is a table of logits, one for each prompt x and answer y, all in float64. Every ordered
pair of answers votes, (winner y, loser y') with weight p(y beats y' | x), so that nothing is
sampled and the expected loss is exact. Throughout, h(y) = log pi(y|x) - log ref(y|x) is the
log-ratio and delta = h(y) - h(y'); a constant in h cancels there, and pi's normalization sets it.
"""

import math

import pytest
import torch

from dpo_minimal.loss import dpo_loss

X, Y = 3, 5  # prompts, answers to each
BETAS = [0.1, 0.5, 2.0]
# A minimum is only as sharp as the square root of its values' precision: 1e-15 in a sum of some 30
# pairs' losses leaves some 1e-8 to 1e-7 for the probabilities.
TOLERANCE = 1e-6


def world():
    """Reference log-probabilities and rewards, [X, Y] each."""
    generator = torch.Generator().manual_seed(0)
    logits, rewards = torch.randn(2, X, Y, generator=generator, dtype=torch.float64)
    return logits.log_softmax(dim=1), rewards


def bradley_terry(rewards):
    """p(y beats y') = sigmoid(r(y) - r(y')), [X, Y, Y]."""
    return torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])


def tilted(ref_logps, exponent):
    """pi(y|x) = ref(y|x) exp(exponent(x, y)) / Z(x), [X, Y]."""
    return (ref_logps + exponent).softmax(dim=1)


def total_variation(p, q):
    """Half the sum of |p - q|, of the prompt where it is largest."""
    return ((p - q).abs().sum(dim=1) / 2).max().item()


def minimizer(ref_logps, votes, beta, **kind):
    """The policy [X, Y] that minimizes the expected loss over all ordered pairs of answers.

    votes [X, Y, Y]: how often y beats y'. Starts at the reference, as DPO does.
    """
    logits = ref_logps.clone().requires_grad_()
    x, y, other = (votes * (1 - torch.eye(votes.shape[1]))).nonzero(as_tuple=True)
    until_it_stands = dict(max_iter=2000, tolerance_grad=1e-13, tolerance_change=0)
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **until_it_stands)

    def expected_loss():
        optimizer.zero_grad()
        logps = logits.log_softmax(dim=1)
        losses, _, _ = dpo_loss(
            logps[x, y], logps[x, other], ref_logps[x, y], ref_logps[x, other], beta, **kind
        )
        loss = (votes[x, y, other] * losses).sum()
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    return logits.detach().softmax(dim=1)


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_lands_on_the_reference_tilted_by_the_reward(beta):
    # A pair's expected loss -p log sigmoid(beta delta) - (1 - p) log sigmoid(-beta delta) is least
    # where sigmoid(beta delta) = p = sigmoid(r(y) - r(y')): beta h = r + constant, for all pairs at
    # once. Hence pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x), the optimum of RLHF.
    ref_logps, rewards = world()
    found = minimizer(ref_logps, bradley_terry(rewards), beta)
    assert total_variation(found, tilted(ref_logps, rewards / beta)) < TOLERANCE


def test_larger_beta_stays_closer_to_the_reference():
    ref_logps, rewards = world()
    votes = bradley_terry(rewards)
    found = [minimizer(ref_logps, votes, beta) for beta in BETAS]
    moved = [total_variation(policy, ref_logps.exp()) for policy in found]
    assert moved[0] > moved[1] + 0.1 > moved[2] + 0.2 > 0.3, moved


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("e", [0.05, 0.1])
def test_cdpo_lands_where_dpo_would_if_each_vote_were_flipped_with_chance_e(beta, e):
    # The smoothed loss of votes p is the plain loss of votes q = (1 - e) p + e (1 - p), so that
    # sigmoid(beta delta) = q. Here q is Bradley-Terry with rewards r, and p is what solves for it:
    # then pi* is again ref exp(r / beta) / Z, while the votes p alone lead farther out.
    ref_logps, rewards = world()
    rewards = 0.6 * rewards  # q within (e, 1 - e), or p would not be a probability
    votes = (bradley_terry(rewards) - e) / (1 - 2 * e)
    assert votes.min() > 0 and votes.max() < 1
    found = minimizer(ref_logps, votes, beta, label_smoothing=e)
    assert total_variation(found, tilted(ref_logps, rewards / beta)) < TOLERANCE


@pytest.mark.parametrize("beta", BETAS)
def test_cdpo_stops_at_a_finite_margin_though_all_agree(beta):
    # p = 1: sigmoid(beta delta) = 1 - e, hence h(winner) - h(loser) = log((1 - e) / e) / beta.
    # DPO itself would drive delta to infinity.
    e = 0.1
    ref_logps = world()[0][:, :2].log_softmax(dim=1)
    unanimous = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64).expand(X, 2, 2)
    found = minimizer(ref_logps, unanimous, beta, label_smoothing=e)
    # Not in total variation: for a small beta the loser's probability is next to nothing anyway.
    h = found.log() - ref_logps
    assert (beta * (h[:, 0] - h[:, 1]) - math.log((1 - e) / e)).abs().max() < TOLERANCE


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("votes", ["Bradley-Terry", "unanimous", "a cycle"])
def test_ipo_lands_on_the_reference_tilted_by_the_rate_of_wins(votes, beta):
    # A pair's expected loss p (delta - c)^2 + (1 - p) (delta + c)^2 with c = 1 / (2 beta) is
    # (delta - t)^2 + constant, where t = c (2 p - 1) = (p - 1/2) / beta. All pairs together are a
    # least squares problem in h: sum over y' of h(y) - h(y') - t(y, y') is 0, so that
    # h(y) = mean over y' of p(y beats y') / beta + constant, y' = y counted with p = 1/2. Hence
    # pi*(y|x) = ref(y|x) exp(rate of wins / beta) / Z(x) (Azar et al. 2023, Psi = identity),
    # whatever the votes: unanimous ones do not lead to infinity, and cycles are averaged out.
    ref_logps, rewards = world()
    if votes == "Bradley-Terry":
        p = bradley_terry(rewards)
    elif votes == "unanimous":
        p = (bradley_terry(rewards) - 0.5).sign() / 2 + 0.5
    else:
        places = torch.arange(Y, dtype=torch.float64) * 2 * torch.pi / Y  # on a ring
        ring = 0.5 + 0.5 * (places[:, None] - places).sin()  # each beats those just behind it
        p = (bradley_terry(rewards) + ring) / 2
    found = minimizer(ref_logps, p, beta, kind="ipo")
    assert total_variation(found, tilted(ref_logps, p.mean(dim=2) / beta)) < TOLERANCE
