"""Problem 12: DPO's gradient by hand, in NumPy."""

import numpy as np

from grader import oracle_losses
from grader.oracle import gradients
from problems.chapter_losses import DPO, dpo_inputs
from problems.ladder import Check, Problem, only


def hand_inputs(n, size=1.0, smoothing=0.0):
    def draw(rng, v):
        i = dpo_inputs(n, size, "float64")(rng, v)
        if smoothing and v.loss != "ipo":
            i["label_smoothing"] = smoothing
        return {name: i[name] for name in i if name not in ("dtype", "kind")}

    return draw


def expect_by_hand(i, v, bug=""):
    a = only(i, *i) | {"v": v, "kind": "ipo" if v.loss == "ipo" else "sigmoid"}
    leaves = {name: a.pop(name) for name in ("pc", "pr")}
    elsewhere = ("sign", "beta left out")  # in the loss these would change the sigmoid too
    bugs = {"bug": bug if bug in DPO.bugs and bug not in elsewhere else ""}
    g = np.ones(len(leaves["pc"])) / (1 if bug == "not averaged" else len(leaves["pc"]))
    found = gradients(lambda **m: oracle_losses.dpo(**a, **m, **bugs)[0], g, step=1e-3, **leaves)
    if bug == "sigmoid of plus delta":
        found = {n: np.sign(d) * (a["beta"] * g - abs(d)) for n, d in found.items()}
    if bug == "sign":
        found = {n: -d for n, d in found.items()}
    if bug == "beta left out":
        found = {n: d / a["beta"] for n, d in found.items()}
    found["d pr"] = -found["d pr"] if bug == "same sign for both" else found["d pr"]
    return found


def logits_inputs(N, V, size=1.0):
    def draw(rng, v):
        logits = size * (rng.standard_normal((N, V)) + 2)
        return {"logits": logits, "targets": rng.integers(0, V, N)}

    return draw


def expect_logits(i, v, bug=""):
    return {"d logits": oracle_losses.logps_gradient(**i, bug=bug)}


BY_HAND = Problem(
    name="dpo_gradient",
    title="DPO's gradient by hand",
    file="by_hand.py",
    holes=("dpo_gradient", "logps_gradient"),
    text="""In NumPy alone; torch cannot be imported here. `dpo_gradient`: the gradient of the
MEAN loss of {by_hand} with respect to the policy's log-probabilities. `logps_gradient`: the
gradient of the SUM of log softmax(logits_n)[target_n] with respect to the logits.""",
    checks=(
        Check(
            *("shape", 1, "dpo_gradient", hand_inputs(5), expect_by_hand),
            "Two vectors, one entry a pair.",
        ),
        Check(
            *("hand value", 1, "dpo_gradient", hand_inputs(1), expect_by_hand),
            "One pair: the derivative of the loss by delta, times +1 and -1.",
            1e-6,
        ),
        Check(
            *("gradient", 2, "dpo_gradient", hand_inputs(6, smoothing=0.2), expect_by_hand),
            "Finite differences of the mean loss, each pair with its share of 1/B, and smoothed.",
            1e-6,
        ),
        Check(
            *("far out", 1, "dpo_gradient", hand_inputs(24, 300.0), expect_by_hand),
            "No overflow where delta is in the hundreds or thousands.",
            1e-6,
        ),
        Check(
            *("logits", 2, "logps_gradient", logits_inputs(3, 4), expect_logits),
            "One-hot minus softmax, row by row.",
            1e-9,
        ),
        Check(
            *("large logits", 1, "logps_gradient", logits_inputs(3, 5, 500.0), expect_logits),
            "Logits of hundreds: take the largest off before the exponential.",
            1e-9,
        ),
    ),
    bugs={
        "not averaged": "1/B is missing: it is the gradient of the mean.",
        "same sign for both": "The rejected answer's gradient has the other sign.",
        "sign": "The sign is wrong.",
        "beta left out": "A factor beta is missing.",
        "beta twice": "beta is applied twice.",
        "reference left out": "delta lacks the reference's log-probabilities.",
        "sigmoid of plus delta": "The weight is sigmoid(-beta delta): large if the pair is wrong.",
        "smoothing ignored": "label_smoothing is ignored.",
        "conservative, not robust": "This is conservative DPO; the problem asks for robust DPO.",
        "softmax left out": "The softmax is missing: d log p(c) / d z_v = 1[v = c] - p(v).",
        "one-hot left out": "The one-hot is missing: d log p(c) / d z_v = 1[v = c] - p(v).",
        "divided by N": "It is the gradient of the sum, not of the mean.",
        "transposed softmax": "The softmax is taken down the columns.",
    },
    changes={
        "sigmoid": "DPO (cDPO where label_smoothing is not 0)",
        "ipo": "IPO, (delta - 1 / (2 beta))^2, label_smoothing unused (NOT the sigmoid loss)",
        "cdpo": "conservative DPO with label_smoothing e",
        "robust": "ROBUST DPO, (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e)",
    },
    template="by_hand.py",
)

PROBLEMS = (BY_HAND,)
