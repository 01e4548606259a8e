"""Gradients computed in three ways that must agree, all in float64.

1. autograd, through our modules
2. by hand: the backward passes of reference.py, which share no line with them
3. central differences of reference.py's forward passes, which need no derivation

`pytest tests/test_gradients.py -s` prints the table: parameter, shape, largest relative difference.

Why 1e-10: float64 loses some 1e-14 of the largest entry in two layers, and a single stop in float32
would lose 1e-7. Plain differences in float64 cannot get there: a step h loses 1e-16 / h to rounding
and h^2 to truncation, some 1e-9 at best. So ours are extrapolated, which leaves h^6, and evaluated
in long double, which leaves 1e-19 / h where that has 64 bits of mantissa, as on x86.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from helpers import quantize_model

from dpo_minimal import loss as loss_module
from dpo_minimal.llama import Block, Llama, LlamaConfig
from dpo_minimal.lora import active_adapters, add_adapter
from dpo_minimal.loss import dpo_loss, sequence_logps, sft_loss
from dpo_minimal.nf4 import NF4Linear, keep_weights

TOLERANCE = 1e-10
STEP = np.longdouble(2.0**-10)
BETA = 0.3
LOSSES = {  # name: (kind, label smoothing)
    "sigmoid": ("sigmoid", 0.0),
    "cDPO": ("sigmoid", 0.2),
    "ipo": ("ipo", 0.0),
    "hinge": ("hinge", 0.0),
}


def relative_difference(a, b):
    """The largest difference of two arrays, relative to the largest entry: both may have zeros."""
    return float(np.abs(a - b).max() / max(np.abs(a).max(), np.abs(b).max()))


def differences(f, x):
    """The gradient of f at x, entry by entry, by central differences in long double."""
    x = x.astype(np.longdouble)
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        unit = np.zeros_like(x)
        unit[i] = 1
        grad[i] = reference.central_difference(lambda h, u=unit: f(x + h * u), STEP)
    return grad


def assert_agree(*gradients):
    """Every two of them are within the tolerance."""
    worst = [[relative_difference(a, b) for a in gradients] for b in gradients]
    assert np.max(worst) < TOLERANCE, f"relative differences {worst}"


# --- The loss alone ---


def four_logps():
    """Summed log-probabilities of 6 pairs, [4, 6]: two easy, two hard, one undecided, one extreme.

    Row 0 chosen, 1 rejected, 2 and 3 the reference's. None has beta * delta = 1, hinge's kink.
    """
    chosen = [-10.0, -12.5, -30.0, -7.0, -20.0, -5.0]
    rejected = [-14.0, -13.0, -21.0, -2.5, -23.0, -185.0]
    ref_chosen = [-11.0, -12.75, -28.0, -6.0, -19.0, -9.0]
    ref_rejected = [-13.0, -13.5, -25.0, -5.0, -22.0, -90.0]
    return np.array([chosen, rejected, ref_chosen, ref_rejected])


@pytest.mark.parametrize("beta", [0.1, BETA])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_for_log_probabilities_agree(name, beta):
    kind, e = LOSSES[name]
    logps = torch.tensor(four_logps(), requires_grad=True)
    dpo_loss(*logps, beta, e, kind)[0].mean().backward()
    _, saved = reference.preference_forward(*four_logps(), beta, kind, e)
    by_hand = np.stack(reference.preference_backward(saved))
    differenced = differences(
        lambda x: reference.preference_forward(*x, beta, kind, e)[0], four_logps()
    )
    assert_agree(logps.grad.numpy(), by_hand, differenced)


def test_dpo_pulls_with_beta_times_the_chance_of_being_wrong():
    # The one line to remember: dL/d log pi(y_w) = -beta sigmoid(-beta delta), the rest by signs.
    logps = torch.tensor(four_logps(), requires_grad=True)
    dpo_loss(*logps, BETA)[0].sum().backward()
    chosen, rejected, ref_chosen, ref_rejected = four_logps()
    delta = chosen - ref_chosen - rejected + ref_rejected
    pull = BETA / (1 + np.exp(BETA * delta))
    assert_agree(logps.grad.numpy(), np.stack((-pull, pull, pull, -pull)))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_for_log_probabilities_pass_gradcheck(name):
    kind, e = LOSSES[name]
    logps = [torch.tensor(row, requires_grad=True) for row in four_logps()]
    # At h = 1e-5 truncation and rounding (of losses up to 1e4, ipo's) are each below 1e-6.
    assert torch.autograd.gradcheck(
        lambda *x: dpo_loss(*x, BETA, e, kind)[0], logps, eps=1e-5, atol=1e-6, rtol=1e-6
    )


def reward_slopes(name, margin, beta):
    """dl/d r_w of each pair, from its reward margin r_w - r_l. Only IPO's still has beta."""
    wrong = 1 / (1 + np.exp(margin))  # the Bradley-Terry chance that the rejected answer wins
    return {
        "sigmoid": -wrong,
        "cDPO": -0.8 * wrong + 0.2 * (1 - wrong),
        "ipo": (2 * margin - 1) / beta**2,  # l = ((r_w - r_l - 1/2) / beta)^2
        "hinge": -1.0 * (margin < 1),
    }[name]


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_for_rewards_agree(name):
    kind, e = LOSSES[name]
    refs = four_logps()[2:]
    rewards = np.array([[0.5, 2.0, -1.0, 0.0, 3.0, -9.0], [0.1, -1.5, 1.0, 0.0, 2.5, 8.0]])

    def logps(r, refs):  # r = beta (log pi - log ref), solved for log pi
        return r[0] / BETA + refs[0], r[1] / BETA + refs[1], *refs

    def loss_by_hand(r):
        return reference.preference_forward(*logps(r, refs), BETA, kind, e)[0]

    r = torch.tensor(rewards, requires_grad=True)
    dpo_loss(*logps(r, torch.tensor(refs)), BETA, e, kind)[0].mean().backward()
    slope = reward_slopes(name, rewards[0] - rewards[1], BETA) / rewards.shape[1]
    by_hand = np.stack((slope, -slope))
    assert_agree(r.grad.numpy(), by_hand, differences(loss_by_hand, rewards))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_for_logits_agree(name):
    kind, e = LOSSES[name]
    tokens, loss_mask = padded_pairs(vocab_size=7)
    rng = np.random.default_rng(1)
    logits = 2 * rng.standard_normal((*tokens.shape, 7))
    refs = rng.uniform(-9, -5, size=(2, 2))  # [chosen or rejected, pair]

    z = torch.tensor(logits, requires_grad=True)
    model = SimpleNamespace(hidden=lambda *_: z, lm_head=lambda hidden: hidden)
    policy = sequence_logps(model, torch.tensor(tokens), torch.tensor(loss_mask)).chunk(2)
    dpo_loss(*policy, *torch.tensor(refs), BETA, e, kind)[0].mean().backward()

    def forward(z):
        token_logps, saved_tokens = reference.response_forward(z, np.eye(7), tokens, loss_mask)
        logps, saved_rows = reference.row_sums_forward(token_logps, loss_mask)
        L, slope = reference.preference_forward(*np.split(logps, 2), *refs, BETA, kind, e)
        return L, (saved_tokens, saved_rows, slope)

    saved_tokens, saved_rows, slope = forward(logits)[1]
    grad = np.concatenate(reference.preference_backward(slope)[:2])
    grad = reference.row_sums_backward(grad, saved_rows)
    by_hand = reference.response_backward(grad, saved_tokens)[0]
    assert_agree(z.grad.numpy(), by_hand, differences(lambda z: forward(z)[0], logits))


# --- The model ---

LLAMA3 = {  # of the 4 planes one is kept, one interpolated, two slowed
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {  # name: (changes to the config, quantize: double, single, or None for plain weights)
    "grouped-query, NF4, sft + dpo": ({}, "double"),
    "tied head": ({"tie_word_embeddings": True}, "single"),
    "Llama 3 rotary scaling": ({"rope_scaling": LLAMA3, "rope_theta": 10000.0}, "double"),
    "plain weights, sft + dpo": ({"num_key_value_heads": 1}, None),
}
SCALES = {"sft": 4 / 2, "dpo": 4 / 3}  # alpha / r


def small_model(name):
    """A two-layer float64 model with random weights, none of them zero, and all of them trained."""
    changes, quantize = MODELS[name]
    shape = dict(vocab_size=24, hidden_size=16, intermediate_size=22, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    rest = dict(rms_norm_eps=1e-2, rope_theta=100.0)  # an eps that counts
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**(shape | heads | rest | changes)))
    randomize(model)
    if quantize:
        quantize_model(model, double_quant=quantize == "double")
    add_adapter(model, "sft", r=2, alpha=4, targets="all")
    add_adapter(model, "dpo", r=3, alpha=4, targets="all")
    randomize(model)
    return model.double().requires_grad_(True)


def randomize(model):
    for name, parameter in model.named_parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape) + ("norm" in name)


def padded_pairs(vocab_size):
    """Two pairs of unequal lengths, tokens and mask [4, 9]: rows 0, 1 chosen, 2, 3 rejected.

    Each answer ends in an EOS, which is scored, and the pads behind it have the same id, 0.
    """
    tokens = np.random.default_rng(0).integers(1, vocab_size, size=(4, 9))
    loss_mask = np.zeros((4, 9), dtype=bool)
    for row, (prompt, end) in enumerate([(3, 9), (2, 6), (3, 8), (2, 5)]):
        loss_mask[row, prompt:end] = True
        tokens[row, end - 1 :] = 0
    tokens[2:, :2] = tokens[:2, :2]  # a pair shares its prompt
    return tokens, loss_mask


def weights_for_reference(model):
    """Every weight in float64 under its name, NF4 ones dequantized by reference.py."""
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            weights[f"{name}.weight"] = dequantized_by_hand(module)
    return {name.replace(".base.", "."): weight for name, weight in weights.items()}


def dequantized_by_hand(layer):
    if layer.absmax is not None:
        absmax = layer.absmax.numpy()
    else:
        parts = layer.absmax_codes, layer.absmax_scale, layer.absmax_offset
        absmax = reference.nf4_absmax(*(part.numpy() for part in parts))
    shape = layer.out_features, layer.in_features
    return reference.nf4_dequantize(layer.packed.numpy(), absmax, shape)


def loss_of_model(model, objective, tokens, loss_mask):
    """The mean loss of a batch by our own code, a scalar."""
    tokens, loss_mask = torch.tensor(tokens), torch.tensor(loss_mask)
    if objective == "sft":
        return sft_loss(model, tokens, loss_mask).mean()
    policy = sequence_logps(model, tokens, loss_mask).chunk(2)
    with torch.no_grad(), active_adapters(model, ["sft"]):
        ref = sequence_logps(model, tokens, loss_mask).chunk(2)
    return dpo_loss(*policy, *ref, BETA)[0].mean()


def autograd_gradients(model, objective, tokens, loss_mask):
    model.zero_grad()
    loss_of_model(model, objective, tokens, loss_mask).backward()
    named = model.named_parameters()
    return {n.replace(".base.", "."): p.grad.numpy() for n, p in named if p.grad is not None}


def reference_logps(weights, tokens, loss_mask, config):
    """log ref(y|x) of each row: base + sft, a constant to the gradients."""
    only_sft = {"sft": SCALES["sft"]}
    token_logps, _ = reference.model_forward(weights, only_sft, tokens, loss_mask, config)
    return reference.row_sums_forward(token_logps, loss_mask)[0]


def forward_by_hand(weights, ref, objective, tokens, loss_mask, config):
    """The mean loss of a batch by reference.py, and what its backward pass needs."""
    token_logps, saved = reference.model_forward(weights, SCALES, tokens, loss_mask, config)
    if objective == "sft":
        L, logps = reference.sft_forward(token_logps)
        return L, (saved, logps, None)
    logps, rows = reference.row_sums_forward(token_logps, loss_mask)
    L, slope = reference.preference_forward(*np.split(logps, 2), *np.split(ref, 2), BETA)
    return L, (saved, slope, rows)


def backward_by_hand(saved, objective):
    saved, last, rows = saved
    if objective == "sft":
        return reference.model_backward(reference.sft_backward(last), saved)
    grad_logps = np.concatenate(reference.preference_backward(last)[:2])
    return reference.model_backward(reference.row_sums_backward(grad_logps, rows), saved)


def directional_difference(weights, forward, name, direction):
    """d/dh of the loss as one weight moves by h * direction: from values, in long double."""

    def loss(h):
        return forward(weights | {name: weights[name] + h * direction})[0]

    return reference.central_difference(loss, STEP)


@pytest.fixture(scope="module")
def table():
    """Collects {parameter: (shape, [worst relative difference of each of three comparisons])}."""
    rows = {}
    yield rows
    if not rows:
        return
    heads = ("parameter", "shape", "autograd/hand", "hand/diff.", "autograd/diff.")
    print("\n\n{:<56}{:<10}{:>14}{:>12}{:>16}".format(*heads))
    for name, (shape, worst) in rows.items():
        print("{:<56}{:<10}{:>14.1e}{:>12.1e}{:>16.1e}".format(name, shape, *worst))
    worst = [max(column) for column in zip(*(w for _, w in rows.values()), strict=True)]
    print("{:<66}{:>14.1e}{:>12.1e}{:>16.1e}".format("largest of all", *worst))


@pytest.mark.parametrize("objective", ["dpo", "sft"])
@pytest.mark.parametrize("name", MODELS)
def test_three_gradients_of_every_parameter_agree(name, objective, table):
    model = small_model(name)
    weights = weights_for_reference(model)
    batch = padded_pairs(vocab_size=24)
    ref = reference_logps(weights, *batch, model.config)

    def forward(weights):
        return forward_by_hand(weights, ref, objective, *batch, model.config)

    by_autograd = autograd_gradients(model, objective, *batch)
    by_hand = backward_by_hand(forward(weights)[1], objective)
    wide = {key: weight.astype(np.longdouble) for key, weight in weights.items()}
    rng = np.random.default_rng(0)
    parameters = [key.replace(".base.", ".") for key, _ in model.named_parameters()]
    assert by_autograd.keys() == set(parameters)
    for key in parameters:
        # Along the gradient's own signs no two entries cancel: each one's error shows in the sum.
        signs = np.where(by_hand[key] < 0, -1, 1)
        direction = signs * rng.uniform(0.5, 1.5, signs.shape) / np.sqrt(signs.size)
        slope = directional_difference(wide, forward, key, direction)
        errors = (
            relative_difference(by_autograd[key], by_hand[key]),
            relative_difference(np.sum(by_hand[key] * direction), slope),
            relative_difference(np.sum(by_autograd[key] * direction), slope),
        )
        shape, worst = table.get(key, (str(list(signs.shape)), (0, 0, 0)))
        table[key] = shape, tuple(map(max, worst, errors))
        assert max(errors) < TOLERANCE, f"{key}: relative differences {errors}"


@pytest.mark.parametrize("name", MODELS)
def test_loss_of_the_model_equals_the_loss_by_hand(name):
    model = small_model(name)
    weights = weights_for_reference(model)
    batch = padded_pairs(vocab_size=24)
    ref = reference_logps(weights, *batch, model.config)
    for objective in ("dpo", "sft"):
        ours = loss_of_model(model, objective, *batch).item()
        by_hand, _ = forward_by_hand(weights, ref, objective, *batch, model.config)
        assert abs(ours - by_hand) < 1e-13 * abs(by_hand)


@pytest.mark.parametrize("trained", ["the dpo adapter", "everything"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_recomputes_and_gives_the_same_gradients(name, trained, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 5)  # the head in several chunks, one of them short
    model = small_model(name)
    weights = weights_for_reference(model)
    batch = padded_pairs(vocab_size=24)
    ref = reference_logps(weights, *batch, model.config)
    by_hand = backward_by_hand(forward_by_hand(weights, ref, "dpo", *batch, model.config)[1], "dpo")
    if trained == "the dpo adapter":  # as in training: what enters the first block is frozen
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(".adapters.dpo." in key)
        keep_weights(model, True)  # else each 4-bit weight is dequantized again for backward
    model.gradient_checkpointing = True
    calls = []
    for module in model.modules():
        if isinstance(module, Block):
            # Before, not after: recomputation stops early, once it has what backward needs.
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    by_autograd = autograd_gradients(model, "dpo", *batch)
    assert len(calls) == 2 * 3  # layers, each called by policy, reference and recomputation
    assert len(by_autograd) == sum(p.requires_grad for p in model.parameters())
    for key, grad in by_autograd.items():
        assert relative_difference(grad, by_hand[key]) < TOLERANCE, key
