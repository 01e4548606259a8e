"""Problems 10 and 11: log-probabilities of responses, and the DPO loss."""

import numpy as np

from grader import oracle_losses
from grader.oracle import gradients
from problems.ladder import Check, Problem, normal, only

FILE = "dpo_minimal/loss.py"

# --- log-probabilities of responses -----------------------------------------------------------


def logps_inputs(B, T, V=7, D=3, dtype="float32", pads=0, size=1.0, **extra):
    def rows(rng):
        lengths = rng.integers(3, T + 1, B)
        lengths[0] = T
        starts = np.array([rng.integers(1, n - 1) for n in lengths])
        place = np.arange(T + pads)
        mask = (place >= starts[:, None]) & (place < lengths[:, None])
        tokens = rng.integers(0, V, (B, T + pads)) * (place < lengths[:, None])
        E, W = normal(rng, V, D), (size * rng.standard_normal((V, D))).astype("float32")
        if dtype == "float16":
            E, W = (np.round(x * 4) / 4 for x in (E, W))  # logits below 128 are exact
        if dtype == "float64":
            E, W = E.astype("float64"), W.astype("float64")
        return {"tokens": tokens, "loss_mask": mask, "E": E, "W": W, "dtype": dtype, **extra}

    def draw(rng, v):
        inputs = rows(rng)
        while np.abs(expect_logps(inputs, v)["logps"]).max() < 0.5:  # near certain: digits are lost
            inputs = rows(rng)
        return inputs

    return draw


def expect_logps(i, v, bug=""):
    a = only(i, "tokens", "loss_mask", "E", "W")
    if "sources" in i:
        grid = oracle_losses.token_logps(**a, sources=i["sources"], bug=bug)
        return {"token logps": grid[i["loss_mask"]]}
    if "g" in i:
        rows = {name: a.pop(name) for name in ("tokens", "loss_mask")}
        return gradients(
            lambda **m: oracle_losses.sequence_logps(**rows, **m, bug=bug), i["g"], **a
        )
    dtype = "float64" if i["dtype"] == "float64" else "float32"
    out = {"logps": oracle_losses.sequence_logps(**a, bug=bug), "dtype": dtype}
    if bug == "log-softmax in 16 bits" and i["dtype"] == "float16":
        out["logps"] = np.float16(out["logps"]).astype("float64")
    return out


def logps_gradient(rng, v):
    return logps_inputs(2, 4, V=4, D=2, dtype="float64")(rng, v) | {"g": normal(rng, 2)}


def logps_sources(rng, v):
    i = logps_inputs(2, 6, V=5)(rng, v)
    return i | {"sources": np.maximum(np.arange(6) - rng.integers(1, 3, (2, 6)), 0)}


LOGPS = Problem(
    name="response_logps",
    title="Log-probabilities of responses",
    file=FILE,
    holes=("chunk_logps", "token_logps", "sequence_logps"),
    text="""`chunk_logps`: log softmax(head(hidden))[target] in float32 at least. `token_logps`: the
same for each scored token, from `model.hidden` at the place before it (or at `sources`), row after
row. The head runs on scored places only, CHUNK of them at a time. (CHUNK is the number at the top
of the file. A check changes it, so read it when you need it.) All chunks but the last are
recomputed in backward (`checkpoint`; if you leave that out, it costs memory but no points).
`sequence_logps`: the sum over each row's scored tokens. The library's losses and log-softmax are
refused.""",
    checks=(
        Check(
            *("shape", 1, "logps", logps_inputs(3, 6), expect_logps),
            "One number per row, in float32 for inputs in float32.",
        ),
        Check(
            *("hand value", 3, "logps", logps_inputs(1, 3, V=3, D=1), expect_logps),
            "Three tokens: each scored one is predicted by the state one place before it.",
        ),
        Check(
            *("invariant", 2, "logps", logps_inputs(4, 5, pads=5), expect_logps),
            "Pads do not count: what is behind the last scored token changes nothing.",
        ),
        Check(
            *("gradient", 3, "logps", logps_gradient, expect_logps),
            "Gradients for embedding and head agree with finite differences.",
        ),
        Check(
            *("chunks", 1, "logps", logps_inputs(3, 9, chunk=4), expect_logps),
            "With CHUNK = 4 the result is the same.",
        ),
        Check(
            *("sources", 1, "logps", logps_sources, expect_logps),
            "Where `sources` is given, it names the place whose state predicts each token.",
        ),
        Check(
            *("float64", 1, "logps", logps_inputs(2, 6, dtype="float64", size=1e3), expect_logps),
            "12 digits in float64, and finite where logits are large.",
            1e-11,
        ),
        Check(
            *("16 bits", 1, "logps", logps_inputs(2, 12, V=40, D=2, dtype="float16"), expect_logps),
            "16-bit logits go through a float32 log-softmax and a float32 sum.",
        ),
    ),
    bugs={
        "not shifted": "A token is scored by a state that has seen it: shift by one.",
        "shifted twice": "A token is scored by the state two places before it: one shift too many.",
        "all scored": "All tokens are scored, prompts and pads too: use the mask.",
        "mask inverted": "The mask is inverted: True means scored.",
        "mean, not sum": "The log-probabilities are averaged; a response's is their sum.",
        "last token left out": "The last scored token, the EOS, is left out.",
        "sign": "The sign is wrong: log-probabilities are negative.",
        "logits, not log-probabilities": "These are logits: the log-sum-exp is not taken off.",
        "sources ignored": "`sources` is ignored.",
        "log-softmax in 16 bits": "The log-softmax is taken in 16 bits.",
    },
    banned=("cross_entropy", "nll_loss", "log_softmax", "cross_entropy_loss", "NLLLoss"),
)

# --- the DPO loss -----------------------------------------------------------------------------


def dpo_inputs(n, size=1.0, dtype="float32", equal=False, **options):
    def draw(rng, v):
        pc, pr, rc, rr = (size * normal(rng, n, dtype=dtype) - 20 for _ in range(4))
        if equal:
            rc, rr = pc, pr
        given = {"ipo": {"kind": "ipo"}, "cdpo": {"label_smoothing": 0.25}}.get(v.loss, {})
        given = {"label_smoothing": 0.25} if v.loss == "robust" else given
        beta = float(rng.choice([0.1, 0.3, 0.5]))
        i = {"pc": pc, "pr": pr, "rc": rc, "rr": rr, "beta": beta, "dtype": dtype}
        return i | (options or given)

    return draw


def expect_dpo(*names):
    def expect(i, v, bug=""):
        a = only(i, "pc", "pr", "rc", "rr", "beta", "label_smoothing", "kind") | {
            "v": v,
            "bug": bug,
        }
        if "g" in i:
            leaves = {name: a.pop(name) for name in ("pc", "pr")}
            return gradients(lambda **m: oracle_losses.dpo(**a, **m)[0], i["g"], **leaves)
        out = dict(zip(("losses", "chosen", "rejected"), oracle_losses.dpo(**a), strict=True))
        out["rewards carry gradients"] = bug == "rewards not detached"
        return {name: out[name] for name in names}

    return expect


def dpo_gradient_inputs(rng, v):
    return dpo_inputs(4)(rng, v) | {"g": rng.uniform(0.5, 2, 4)}


def refusals(rng, v):
    return {"kinds": ["dpo", "ipo", "hinge", "ipo"], "smoothings": [0.0, 0.1, 0.1, 0.0]}


DPO = Problem(
    name="dpo_loss",
    title="The DPO loss",
    file=FILE,
    holes=("sigmoid_loss", "ipo_loss", "hinge_loss", "dpo_loss"),
    text="""Losses and rewards from summed log-probabilities, as the docstrings have them: nothing
is averaged, rewards are beta times the log-ratios and carry no gradient, a log-sigmoid of -1000 is
-1000 and not -inf, options that make no sense raise a ValueError. The kinds of loss are functions
of delta, which the table LOSSES names; only `dpo_loss` is called, so it may also hold all three.
{loss}""",
    checks=(
        Check(
            *("shape", 1, "dpo", dpo_inputs(5), expect_dpo("losses", "chosen", "rejected")),
            "Three vectors, one entry a pair.",
        ),
        Check(
            *("hand value", 2, "dpo", dpo_inputs(1), expect_dpo("losses")),
            "One pair: delta = (pc - rc) - (pr - rr), then the loss of the kind that is asked for.",
        ),
        Check(
            *(
                "rewards",
                2,
                "dpo",
                dpo_inputs(4),
                expect_dpo("chosen", "rejected", "rewards carry gradients"),
            ),
            "Rewards are beta * (log pi - log ref), detached.",
        ),
        Check(
            *("gradient", 3, "dpo", dpo_gradient_inputs, expect_dpo()),
            "The gradient is -beta sigmoid(-beta delta) for pc, the negative for pr.",
        ),
        Check(
            *("step 0", 1, "dpo", dpo_inputs(3, equal=True, kind="sigmoid"), expect_dpo("losses")),
            "Where policy and reference agree the loss is ln 2 in all digits.",
            1e-7,
        ),
        Check(
            *("ipo", 1, "dpo", dpo_inputs(4, kind="ipo"), expect_dpo("losses")),
            "IPO: (delta - 1 / (2 beta))^2.",
        ),
        Check(
            *("hinge", 1, "dpo", dpo_inputs(6, size=8.0, kind="hinge"), expect_dpo("losses")),
            "Hinge: max(0, 1 - beta delta).",
        ),
        Check(
            *("smoothing", 1, "dpo", dpo_inputs(4, label_smoothing=0.1), expect_dpo("losses")),
            "label_smoothing is the share of wrong votes.",
        ),
        Check(
            *(
                "far out",
                1,
                "dpo",
                dpo_inputs(16, 1e4, "float64", kind="sigmoid"),
                expect_dpo("losses"),
            ),
            "Finite and exact at a delta of thousands.",
            1e-11,
        ),
        Check(
            *(
                "options",
                1,
                "dpo_refuses",
                refusals,
                lambda i, v, bug="": {"raised": ["ValueError"] * 3 + ["nothing"]},
            ),
            "An unknown kind, or smoothing with ipo or hinge, is a ValueError.",
        ),
    ),
    bugs={
        "sign": """The sign of delta is wrong (or chosen and rejected are swapped, or the smoothing
weights the wrong term): the loss falls as the rejected answer gains.""",
        "pair swapped": "Chosen and rejected are swapped.",
        "reference left out": "The reference's log-probabilities are left out.",
        "beta twice": "beta is applied twice.",
        "beta left out": "beta is left out.",
        "rewards without beta": "Rewards lack beta.",
        "rewards not detached": "Rewards carry a gradient: detach them.",
        "smoothing ignored": "label_smoothing is ignored.",
        "conservative, not robust": "This is conservative DPO; the problem asks for robust DPO.",
        "1 / beta for 1 / (2 beta)": "IPO's target is 1 / (2 beta).",
    },
    changes={
        "sigmoid": "",
        "ipo": "Most rungs ask for kind = 'ipo'.",
        "cdpo": "Most rungs ask for conservative DPO, label_smoothing = 0.25.",
        "robust": """NOT AS TAUGHT: label_smoothing e gives robust DPO (Chowdhury et al. 2024),
((1 - e) * -log sigmoid(beta delta) - e * -log sigmoid(-beta delta)) / (1 - 2 e).""",
    },
)

PROBLEMS = (LOGPS, DPO)
