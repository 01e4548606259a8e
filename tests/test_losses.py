"""The further losses: values and gradients by hand, and where each one leads.

As in test_optimum.py the policy is a table over three prompts with five answers, float64, and every
ordered pair (winner y, loser y') counts with a weight. p(y, y') is how often y beats y'; h is the
log-ratio log pi - log ref, s = log pi / |y| the mean per token.
"""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from test_optimum import TOLERANCE, X, Y, bradley_terry, tilted, total_variation, world

from dpo_minimal import InputError
from dpo_minimal.batches import pair_batch
from dpo_minimal.data import EncodedPair
from dpo_minimal.extras import measure
from dpo_minimal.extras.losses import (
    MORE_LOSSES,
    LossSettings,
    batch_lengths,
    check_loss,
    describe_loss,
    loss_settings,
    pair_lengths,
    preference_loss,
)
from dpo_minimal.loss import LOSSES, dpo_loss

close = partial(np.testing.assert_allclose, rtol=0, atol=1e-10)
SETTINGS = {  # one for each loss
    "robust": LossSettings("robust", beta=0.5, label_smoothing=0.25),
    "apo_zero": LossSettings("apo_zero", beta=0.5),
    "kto": LossSettings("kto", beta=0.5),
    "simpo": LossSettings("simpo", beta=2.0, simpo_gamma=0.3),
    "orpo": LossSettings("orpo", beta=0.5),
    "sigmoid with NLL": LossSettings("sigmoid", beta=0.5, nll_weight=0.75),
}
# Log-probabilities of 4 pairs, policy and reference, chosen and rejected, and the answers' lengths.
LOGPS = np.array(
    [[-1.0, -9.0, -6.0, -4.5], [-4.0, -7.0, -5.0, -30.0], [-2.0, -6.0, -9, -4], [-3.0, -9, -5, -9]]
)
LENGTHS = np.array([[2, 4], [7, 3], [5, 5], [3, 20]])


def compute(settings, logps, lengths=LENGTHS):
    """`preference_loss` of log-probabilities [4, B]."""
    return preference_loss(*logps, lengths=torch.as_tensor(lengths), settings=settings)


# --- values and gradients by hand ---


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(settings):
    """(losses, d loss / d log pi(y_w), d loss / d log pi(y_l)) of LOGPS, [B] each."""
    chosen, rejected, ref_chosen, ref_rejected = LOGPS
    n_w, n_l = LENGTHS.T
    beta, e = settings.beta, settings.label_smoothing
    h_w, h_l = chosen - ref_chosen, rejected - ref_rejected
    s_w, s_l = chosen / n_w, rejected / n_l
    u = beta * (h_w - h_l)
    if settings.loss == "robust":  # d -log sigmoid(u) / du = -sigmoid(-u)
        losses = ((1 - e) * np.log1p(np.exp(-u)) - e * np.log1p(np.exp(u))) / (1 - 2 * e)
        slope = beta * (-(1 - e) * sigmoid(-u) - e * sigmoid(u)) / (1 - 2 * e)
        return losses, slope, -slope
    if settings.loss in ("apo_zero", "kto"):  # sigmoid' = sigmoid (1 - sigmoid)
        is_kto = settings.loss == "kto"
        z_w, z_l = (max(0, h.mean()) if is_kto else 0 for h in (h_w, h_l))
        good, bad = sigmoid(beta * (h_w - z_l)), sigmoid(beta * (h_l - z_w))
        return 1 - good + bad, -beta * good * (1 - good), beta * bad * (1 - bad)
    if settings.loss == "simpo":
        v = beta * (s_w - s_l) - settings.simpo_gamma
        return np.log1p(np.exp(-v)), -beta * sigmoid(-v) / n_w, beta * sigmoid(-v) / n_l
    if settings.loss == "orpo":  # d log(q / (1 - q)) / d log q = 1 / (1 - q)
        q_w, q_l = np.exp(s_w), np.exp(s_l)
        v = np.log(q_w / (1 - q_w)) - np.log(q_l / (1 - q_l))
        pull = beta * sigmoid(-v)
        slopes = (-1 - pull / (1 - q_w)) / n_w, pull / (1 - q_l) / n_l
        return -s_w + beta * np.log1p(np.exp(-v)), *slopes
    w = settings.nll_weight
    losses = np.log1p(np.exp(-u)) - w * s_w
    return losses, -beta * sigmoid(-u) - w / n_w, beta * sigmoid(-u)


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_are_those_by_hand(name):
    logps = torch.tensor(LOGPS, requires_grad=True)
    losses, *_ = compute(SETTINGS[name], logps)
    losses.sum().backward()
    found = losses.detach(), *logps.grad[:2]
    for ours, expected in zip(found, by_hand(SETTINGS[name]), strict=True):
        close(ours, expected)
    chosen, rejected = logps.grad[:2]
    assert (chosen < 0).all() and (rejected > 0).all()  # up with the chosen answer, always


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "kto"])
def test_gradients_are_those_of_differences(name):
    logps = [torch.tensor(row, requires_grad=True) for row in LOGPS]
    assert torch.autograd.gradcheck(lambda *x: compute(SETTINGS[name], x)[0], logps)


def test_the_first_pair_in_numbers():
    # h = 1 and -1; s = -1/2 and -1. KTO of this pair alone: z_w = 1, z_l = max(0, -1) = 0.
    def first(name):
        losses, *_ = compute(SETTINGS[name], torch.tensor(LOGPS[:, :1]), LENGTHS[:1])
        return losses.item()

    # 2 (0.75 * 0.3132617 - 0.25 * 1.3132617)
    assert first("robust") == pytest.approx(-0.1867383125)
    assert first("apo_zero") == pytest.approx(0.7550813376)  # 2 - 2 * 0.6224593
    assert first("kto") == pytest.approx(0.6464820902)  # 2 - 0.6224593 - 0.7310586
    assert first("simpo") == pytest.approx(0.4031860036)  # log(1 + exp(-0.7))
    # The odds are 1.5414941 and 0.5819767, their ratio 2.6487213; 0.5 + 0.5 log(1 + 1 / 2.6487213)
    assert first("orpo") == pytest.approx(0.6601498926)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_without_a_reference_rewards_are_beta_times_the_mean_and_no_reference_is_looked_at(name):
    logps = torch.tensor(LOGPS, requires_grad=True)
    losses, chosen, rejected = compute(SETTINGS[name], logps)
    close(chosen, SETTINGS[name].beta * LOGPS[0] / LENGTHS[:, 0])
    close(rejected, SETTINGS[name].beta * LOGPS[1] / LENGTHS[:, 1])
    assert not chosen.requires_grad and not rejected.requires_grad
    losses.sum().backward()
    assert not logps.grad[2:].any()


@pytest.mark.parametrize("name", ["robust", "apo_zero", "kto", "sigmoid with NLL"])
def test_with_a_reference_rewards_are_beta_times_the_log_ratio(name):
    _, chosen, rejected = compute(SETTINGS[name], torch.tensor(LOGPS, requires_grad=True))
    close(chosen, SETTINGS[name].beta * (LOGPS[0] - LOGPS[2]))
    close(rejected, SETTINGS[name].beta * (LOGPS[1] - LOGPS[3]))
    assert not chosen.requires_grad and not rejected.requires_grad


@pytest.mark.parametrize("kind", LOSSES)
def test_the_losses_of_delta_are_left_to_dpo_loss(kind):
    smoothing = 0.2 if kind == "sigmoid" else 0.0
    found = compute(LossSettings(kind, 0.3, smoothing), torch.tensor(LOGPS))
    expected = dpo_loss(*torch.tensor(LOGPS), 0.3, smoothing, kind)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "kto"])
def test_a_pair_has_its_loss_whatever_is_beside_it(name):
    together, *_ = compute(SETTINGS[name], torch.tensor(LOGPS))
    alone = [
        compute(SETTINGS[name], torch.tensor(LOGPS[:, [i]]), LENGTHS[[i]])[0] for i in range(4)
    ]
    close(together, torch.cat(alone))


@pytest.mark.parametrize("name", SETTINGS)
def test_extreme_log_probabilities_stay_finite(name):
    # Certain answers (log-probability 0), and hopeless ones.
    values = [[0.0, -5000.0, 0.0], [-5000.0, 0.0, 0.0], [-9.0] * 3, [-9.0] * 3]
    logps = torch.tensor(values, requires_grad=True)
    losses, *_ = compute(SETTINGS[name], logps, [[2, 2]] * 3)
    losses.sum().backward()
    assert losses.isfinite().all() and logps.grad.isfinite().all()


# --- where they lead ---


def minimizer(settings, ref_logps, weights, lengths=None, rounds=1):
    """The policy [X, Y] where the weighted loss of all ordered pairs of answers is least.

    weights [X, Y, Y]: of y as winner and y' as loser. lengths [X, Y], else 1. Starts at ref_logps.
    """
    logits = ref_logps.clone().requires_grad_()
    x, y, other = (weights * (1 - torch.eye(weights.shape[1]))).nonzero(as_tuple=True)
    lengths = torch.ones(weights.shape[:2]) if lengths is None else lengths
    pair_lengths = torch.stack((lengths[x, y], lengths[x, other]), dim=1)
    until_it_stands = dict(max_iter=2000, tolerance_grad=1e-13, tolerance_change=0)

    def expected_loss():
        optimizer.zero_grad()
        logps = logits.log_softmax(dim=1)
        pairs = logps[x, y], logps[x, other], ref_logps[x, y], ref_logps[x, other]
        loss = (weights[x, y, other] * compute(settings, pairs, pair_lengths)[0]).sum()
        loss.backward()
        return loss

    for _ in range(rounds):
        optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **until_it_stands)
        optimizer.step(expected_loss)
    return logits.detach().softmax(dim=1)


def some_lengths():
    """Tokens of each answer, [X, Y]."""
    return torch.randint(1, 6, (X, Y), generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("e", [0.1, 0.3])
def test_robust_dpo_of_flipped_votes_lands_where_dpo_of_the_true_ones_does(beta, e):
    # l(u) = -log sigmoid(u). Of q = (1 - e) p + e (1 - p) flipped votes the expected loss is
    # [q ((1 - e) l(u) - e l(-u)) + (1 - q) ((1 - e) l(-u) - e l(u))] / (1 - 2e). l(u) has the
    # weight (q - e) / (1 - 2e) = p, l(-u) has 1 - p: DPO's loss of the votes as they were.
    ref_logps, rewards = world()
    p = bradley_terry(rewards)
    q = (1 - e) * p + e * (1 - p)
    found = minimizer(LossSettings("robust", beta, label_smoothing=e), ref_logps, q)
    assert total_variation(found, tilted(ref_logps, rewards / beta)) < TOLERANCE


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_hinge_asks_for_a_margin_of_one_and_no_more_however_many_agree(beta):
    # A pair's expected loss p max(0, 1 - u) + (1 - p) max(0, 1 + u), u = beta delta, has slope
    # 1 - 2p between -1 and 1, -p + (1 - p) turned around outside: for p > 1/2 it is least at u = 1.
    ref = torch.log(torch.tensor([0.2, 0.8], dtype=torch.float64))
    low, high = -60.0, 60.0  # the log-odds of the two answers; the loss is convex in them
    golden = (math.sqrt(5) - 1) / 2

    def loss(odds, p=0.6):
        first, second = torch.tensor([odds, 0.0], dtype=torch.float64).log_softmax(dim=0)
        logps = torch.stack((first, second, *ref)), torch.stack((second, first, *ref.flip(0)))
        losses = [
            compute(LossSettings("hinge", beta), rows[:, None], [[1, 1]])[0] for rows in logps
        ]
        return p * losses[0] + (1 - p) * losses[1]

    for _ in range(90):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    assert low - (ref[0] - ref[1]).item() == pytest.approx(1 / beta, abs=TOLERANCE)


def gains(p):
    """m(y) = sum over y' of p(y, y') - p(y', y): won minus lost, [X, Y]."""
    return (p - p.transpose(1, 2)).sum(dim=2)


def apo_optimum(ref_logps, p):
    """The closed form of APO-zero at beta = 1, see below; [X, Y]."""
    policy = torch.zeros(X, Y, dtype=torch.float64)
    for x, (ref, m) in enumerate(zip(ref_logps.exp(), gains(p), strict=True)):
        alive = m > 0
        for _ in range(Y):  # answers that would get less than nothing get nothing
            root = torch.sqrt(m[alive] * ref[alive])
            policy[x] = 0
            policy[x, alive] = root * (1 + ref[alive].sum()) / root.sum() - ref[alive]
            alive = alive & (policy[x] > 0)
    return policy


def test_apo_zero_drops_the_losers_and_shares_by_the_root_of_gain_times_reference():
    # Summed over all votes the loss is -sum of m(y) sigmoid(beta h(y)), m = won minus lost. With
    # beta = 1 and u = e^h, sigmoid(h) = u / (1 + u) is concave in u, and sum of ref u = 1 is linear
    # in it. Losers, m < 0, get u = 0. For the others m / (1 + u)^2 = C ref with one C per prompt:
    # u = sqrt(m / (C ref)) - 1, or 0 where that is negative, and C makes pi = ref u sum to 1.
    ref_logps, rewards = world()
    p = bradley_terry(rewards)
    found = minimizer(LossSettings("apo_zero", beta=1.0), ref_logps, p)
    expected = apo_optimum(ref_logps, p)
    assert total_variation(found, expected) < TOLERANCE
    assert (expected == 0).sum() > X and (expected > 0.01).sum() > X  # neither one nor all


def test_kto_stands_still_where_apo_zero_does_once_the_losers_are_gone():
    # Unanimous votes. Middling answers win and lose; those that lose more often than they win go
    # to 0, h to -infinity, and with them both mean gains. So z = 0, and KTO is APO-zero.
    ref_logps, rewards = world()
    unanimous = (rewards[:, :, None] > rewards[:, None, :]).double()
    found = minimizer(LossSettings("kto", beta=1.0), ref_logps, unanimous, rounds=5)
    assert total_variation(found, apo_optimum(ref_logps, unanimous)) < TOLERANCE


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_simpo_lands_on_the_reward_per_token_and_forgets_the_reference(gamma):
    # With u = beta (s - s') and g = e^-gamma a pair's loss is -p log sigmoid(u - gamma) - (1 - p)
    # log sigmoid(-u - gamma), least where p / (1 - p) = (1 + g e^u) / (1 + g e^-u). Votes that are
    # so for u = r(y) - r(y') (Bradley-Terry for gamma = 0) ask for beta s = r + c, for all pairs
    # at once: pi*(y|x) = exp(|y| (r(x, y) + c(x)) / beta), where c makes them sum to 1. There is no
    # ref in it, and a longer answer's probability is a power of that many tokens.
    beta, lengths = 2.0, some_lengths()
    ref_logps, rewards = world()
    win = 1 + torch.exp(rewards[:, :, None] - rewards[:, None, :] - gamma)
    votes = win / (win + win.transpose(1, 2))
    found = minimizer(LossSettings("simpo", beta, simpo_gamma=gamma), ref_logps, votes, lengths)
    low, high = torch.full((X, 1), -50.0).double(), torch.full((X, 1), 50.0).double()
    for _ in range(100):
        c = (low + high) / 2
        too_much = torch.exp(lengths * (rewards + c) / beta).sum(dim=1, keepdim=True) > 1
        low, high = torch.where(too_much, low, c), torch.where(too_much, c, high)
    expected = torch.exp(lengths * (rewards + c) / beta)
    assert total_variation(found, expected) < TOLERANCE


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_orpo_lands_where_both_of_its_terms_agree(weight):
    # The NLL alone is least at pi(y) in proportion to W(y) / |y|, W(y) = sum over y' of the weights
    # of y's wins; the odds ratio alone where log odds(y) - log odds(y') = log p / (1 - p). Take any
    # pi*: votes sigmoid(log odds* - log odds*'), pairs asked so often that W / |y| is pi*. Both
    # terms have their minimum there, and so has the loss, whatever beta is.
    lengths = some_lengths()
    target = world()[1].mul(0.3).softmax(dim=1)
    s = target.log() / lengths
    p = bradley_terry(s - torch.log(-torch.expm1(s)))
    often = asked(p, lengths * target)
    found = minimizer(LossSettings("orpo", beta=weight), world()[0], often * p, lengths)
    assert total_variation(found, target) < TOLERANCE


def asked(p, wins):
    """How often each pair is asked, [X, Y, Y] symmetric and positive, so that y wins[x, y] times.

    a(y) + a(y') for each pair; wins(y) = sum over y' of (a(y) + a(y')) p(y, y') is linear in a.
    """
    p = p * (1 - torch.eye(Y))
    a = torch.linalg.solve(p + torch.diag_embed(p.sum(dim=2)), wins)
    often = a[:, :, None] + a[:, None, :]
    assert (often[:, ~torch.eye(Y, dtype=bool)] > 0).all()
    return often


@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_dpo_with_nll_lands_where_both_terms_agree_and_between_them_elsewhere(weight):
    # The NLL per token alone is least at pi(y) in proportion to W(y) / |y|. From a reference that
    # is this, tilted by -r / beta, DPO lands on it too, and so does their sum for any weight.
    beta, lengths, settings = 0.5, some_lengths(), LossSettings(beta=0.5, nll_weight=weight)
    ref_logps, rewards = world()
    p = bradley_terry(rewards)
    imitation = (p * (1 - torch.eye(Y))).sum(dim=2) / lengths
    imitation = imitation / imitation.sum(dim=1, keepdim=True)
    start = (imitation.log() - rewards / beta).log_softmax(dim=1)
    assert total_variation(minimizer(settings, start, p, lengths), imitation) < TOLERANCE
    # Elsewhere, on the way from one to the other.
    dpo = tilted(ref_logps, rewards / beta)
    found = minimizer(settings, ref_logps, p, lengths)
    whole = total_variation(dpo, imitation)
    assert total_variation(found, dpo) > 0.01 and total_variation(found, imitation) < whole - 0.01


# --- flags, lengths, words ---


def test_lengths_are_the_answers_tokens_in_a_batch_and_apart():
    pairs = [EncodedPair([1, 5], [6, 7, 2], [8, 2]), EncodedPair([1], [2], [3, 4, 5, 6, 2])]
    assert pair_lengths(pairs).tolist() == [[3, 2], [1, 5]]
    assert batch_lengths(pair_batch(pairs, [1, 0], "cpu")).tolist() == [[1, 5], [3, 2]]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"loss": "apo_zero", "label_smoothing": 0.1}, "sigmoid or robust, not apo_zero"),
        ({"loss": "robust"}, "--loss robust needs --label-smoothing"),
        ({"loss": "orpo", "simpo_gamma": 0.7}, "--simpo-gamma goes with --loss simpo, not orpo"),
        ({"loss": "orpo", "nll_weight": 0.7}, "--nll-weight does not go with --loss orpo"),
    ],
)
def test_flags_that_say_nothing_together_are_refused(flags, said):
    with pytest.raises(InputError, match=said):
        check_loss(loss_settings(flags))


@pytest.mark.parametrize("kind", [*LOSSES, *MORE_LOSSES])
def test_every_loss_goes_by_itself(kind):
    check_loss(LossSettings(kind, label_smoothing=0.1 if kind == "robust" else 0.0))


def test_settings_are_those_of_a_run_even_of_one_that_had_fewer_flags():
    flags = {"loss": "ipo", "beta": 0.3, "label_smoothing": 0.0, "seed": 1}
    assert loss_settings(flags) == LossSettings("ipo", 0.3)
    settings = LossSettings("simpo", 2.0, simpo_gamma=1.0, nll_weight=0.25)
    assert describe_loss(settings) == "simpo, beta 2, simpo gamma 1, nll weight 0.25"
    assert describe_loss(LossSettings()) == "sigmoid, beta 0.1"


def test_evaluate_takes_the_loss_of_the_run_beside_whole_or_not_at_all(tmp_path):
    saved = {"beta": 3.0, "loss": "simpo", "simpo_gamma": 1.0, "nll_weight": 0.5}
    (tmp_path / "config.json").write_text(json.dumps({"arguments": saved}))
    flags = ["--model", str(tmp_path / "merged")]
    for given, expected in (
        ([], LossSettings("simpo", 3.0, simpo_gamma=1.0, nll_weight=0.5)),
        (["--loss", "orpo"], LossSettings("orpo", 3.0)),
        (["--loss", "simpo", "--simpo-gamma", "2"], LossSettings("simpo", 3.0, 0.0, 2.0, 0.5)),
    ):
        args = measure.make_parser().parse_args([*flags, *given])
        measure.fill_in(args)
        assert loss_settings(vars(args)) == expected


def test_a_model_by_itself_is_measured_by_a_loss_without_a_reference(capsys):
    args = measure.make_parser().parse_args(["--loss", "simpo", "--beta", "2", "--data", "x"])
    args.label_smoothing, args.simpo_gamma, args.nll_weight = 0.0, 0.5, 0.0
    policy = torch.tensor([[-4.0, -9.0]])  # 2 and 3 tokens: s = -2 and -3, margin 2
    cells = measure.rewards_of(args, policy, torch.zeros(1, 2), torch.tensor([[2, 3]]))
    assert cells == f"1.000 | +2.0000 | {math.log1p(math.exp(-1.5)):.4f}"
