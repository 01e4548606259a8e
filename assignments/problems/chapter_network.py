"""Problems 1 to 3: RMSNorm, the rotary embedding, attention."""

import numpy as np

from grader import oracle
from problems.ladder import Check, Problem, normal, only

# --- RMSNorm ----------------------------------------------------------------------------------


def norm_inputs(*shape, dtype="float32", size=1.0, **extra):
    def draw(rng, v):
        x = (size * rng.standard_normal(shape)).astype(dtype)
        w = rng.uniform(0.5, 2, shape[-1]).astype(dtype)
        return {"x": x, "w": w, "eps": 1e-5, "dtype": dtype, **extra}

    return draw


def expect_norm(i, v, bug=""):
    a = only(i, "x", "w", "eps")
    out = {"y": oracle.rmsnorm(**a, bug=bug), "dtype": i["dtype"]}
    if "g" not in i:
        return out

    def f(x, w):
        return oracle.rmsnorm(x, w, a["eps"], bug)

    return oracle.gradients(f, i["g"], x=a["x"], w=a["w"])


def norm_by_hand(rng, v):
    x = rng.integers(1, 9, (1, 2)).astype("float32")
    return {"x": x, "w": np.array([1, 2], "float32"), "eps": 0.0, "dtype": "float32"}


def norm_gradient(rng, v):
    return norm_inputs(2, 5)(rng, v) | {"g": normal(rng, 2, 5)}


RMSNORM = Problem(
    name="rmsnorm",
    title="RMSNorm",
    file="dpo_minimal/llama.py",
    holes=("RMSNorm.forward",),
    text="""Divide each vector by the root of the mean of its squares (plus `eps`, inside the root)
and multiply by the weight. Sums of 16-bit numbers overflow: compute in `at_least_float32(x)` and
return the dtype of x. By hand: x = [3, 4], weight = [1, 2], eps = 0 gives [0.8485, 2.2627].""",
    checks=(
        Check(
            *("shape", 1, "rmsnorm", norm_inputs(2, 3, 8), expect_norm),
            "The output has x's shape and dtype and depends on x.",
        ),
        Check(
            *("hand value", 2, "rmsnorm", norm_by_hand, expect_norm),
            "For [3, 4] the mean square is 12.5: [3, 4] / sqrt(12.5) * weight.",
        ),
        Check(
            *("invariant", 1, "rmsnorm", norm_inputs(2, 3, 8, size=100.0), expect_norm),
            "100 x has the same output as x, as eps hardly counts there.",
        ),
        Check(
            *("gradient", 2, "rmsnorm", norm_gradient, expect_norm),
            "The gradients with respect to x and the weight agree with finite differences.",
            1e-3,
        ),
        Check(
            *("float64", 1, "rmsnorm", norm_inputs(3, 7, dtype="float64", size=0.01), expect_norm),
            "float64 in, float64 out with 12 digits; with x as small as sqrt(eps), eps decides.",
            1e-12,
        ),
        Check(
            *(
                "16 bits",
                1,
                "rmsnorm",
                norm_inputs(2, 64, dtype="float16", size=300.0),
                expect_norm,
            ),
            "300^2 is more than float16 can hold: square and average in float32.",
            2e-3,
        ),
    ),
    bugs={
        "mean taken off": "The mean is taken off first: that is LayerNorm. RMSNorm keeps it.",
        "eps outside the root": "eps is added behind the root; it belongs to the mean square.",
        "no root": "The division is by the mean square itself: its root is missing.",
        "sum, not mean": "The squares are summed, not averaged: the size D changes the result.",
        "weight left out": "The weight is not applied.",
        "over tokens": "The mean is taken over the tokens; it belongs to the last axis.",
        "eps left out": "eps is left out.",
    },
    banned=("rms_norm", "layer_norm"),
)

# --- rotary embedding -------------------------------------------------------------------------


def rotary_inputs(B, H, T, K, dtype="float32", table="float32", start=0, rows_apart=False):
    def draw(rng, v):
        positions = np.arange(start, start + T) + 7 * np.arange(B)[:, None] * rows_apart
        x = normal(rng, B, H, T, K, dtype=dtype)
        if dtype == "float16":
            x = (np.sign(x) * rng.uniform(1, 1.4, x.shape)).astype(dtype)
        theta = float(rng.integers(50, 5000))
        return {"x": x, "positions": positions, "theta": theta, "dtype": dtype, "table": table}

    return draw


def expect_rotary(i, v, bug=""):
    a = only(i, "x", "positions", "theta")
    if "g" in i:
        rest = {"positions": a["positions"], "theta": a["theta"], "v": v, "bug": bug}
        return oracle.gradients(lambda x: oracle.rotary(x, **rest), i["g"], x=a["x"])
    B, _, T, K = i["x"].shape
    y = oracle.rotary(**a, v=v, bug=bug)
    return {"y": y, "cos shape": [B, 1, T, K // 2], "dtype": i["dtype"]}


def rotary_by_hand(rng, v):
    x = rng.integers(1, 5, (1, 1, 2, 2)).astype("float32")
    return {"x": x, "positions": np.array([[0, int(rng.integers(2, 5))]]), "theta": 100.0} | {
        "dtype": "float32"
    }


def rotary_gradient(rng, v):
    return rotary_inputs(1, 2, 3, 4, start=2)(rng, v) | {"g": normal(rng, 1, 2, 3, 4)}


ROTARY = Problem(
    name="rotary",
    title="Rotary embedding",
    file="dpo_minimal/llama.py",
    holes=("rotary_table", "rotate"),
    text="""`rotary_table`: cos, sin of position times frequency (`inverse_frequencies` is given),
each [B, 1, T, K/2]. `rotate`: turn the plane of two entries by its angle,
(a, b) -> (a cos - b sin, b cos + a sin). {layout}
Compute in the table's dtype, return x's.""",
    checks=(
        Check(
            *("shape", 1, "rotary", rotary_inputs(2, 3, 4, 6), expect_rotary),
            "cos and sin are [B, 1, T, K/2]; what is turned keeps its shape and dtype.",
        ),
        Check(
            *("hand value", 2, "rotary", rotary_by_hand, expect_rotary),
            "With K = 2 there is one plane of frequency 1: at position p it turns by p radians.",
        ),
        Check(
            *("invariant", 2, "rotary", rotary_inputs(1, 1, 5, 8), expect_rotary),
            "Each plane keeps its length, position 0 stays, and planes are the right pairs.",
        ),
        Check(
            *("gradient", 2, "rotary", rotary_gradient, expect_rotary),
            "The gradient is that of a rotation: the upstream one turned back.",
        ),
        Check(
            *("float64", 1, "rotary"),
            *(rotary_inputs(3, 1, 4, 6, "float64", "float64", 5, True), expect_rotary),
            "Positions are the given ones, row by row, to float64's digits.",
            1e-11,
        ),
        Check(
            *(
                "16 bits",
                1,
                "rotary",
                rotary_inputs(2, 4, 12, 16, "float16", start=900),
                expect_rotary,
            ),
            "The product is taken in the table's dtype and only then rounded to x's.",
            3.5e-4,  # results are below 2: one rounding is off by 2^-11 of them at most
        ),
    ),
    bugs={
        "other layout": "The planes are of the other layout (halves or neighbours).",
        "neighbours in, halves out": "Planes are taken from neighbours and put back as halves.",
        "turned backwards": "It turns backwards: the sign of the sine.",
        "cos and sin swapped": "cos and sin are swapped.",
        "a sign in the second half": "The second entry of a plane has a wrong sign: b cos + a sin.",
        "counted in the row": "Positions are counted along the row; they are given.",
        "positions of the first row": "All rows turn by the first row's positions.",
        "half the exponent": "Frequencies are theta^(-2i/K), as `inverse_frequencies` gives them.",
    },
    changes={
        "halves": "x_i is paired with x_(i + K/2), not with its neighbour: the half-split layout.",
        "interleaved": "The plane i is (x_2i, x_(2i + 1)): NEIGHBOURS, not the taught layout.",
    },
)

# --- attention --------------------------------------------------------------------------------


def attention_inputs(B, T, D, heads, dtype="float32", **extra):
    def draw(rng, v):
        H, G, K = heads
        shapes = {"x": (B, T, D), "wq": (H * K, D), "wk": (G * K, D), "wv": (G * K, D)}
        shapes |= {"wo": (D, H * K), "cos": (B, 1, T, K // 2), "sin": (B, 1, T, K // 2)}
        out = {name: normal(rng, *shape, dtype=dtype) for name, shape in shapes.items()}
        return out | {"heads": list(heads), "dtype": dtype, **extra}

    return draw


def expect_attention(i, v, bug=""):
    a = only(i, "x", "wq", "wk", "wv", "wo", "heads", "cos", "sin", "mask")
    if "g" not in i:
        return {"y": oracle.attention(**a, bug=bug)}
    fixed = {name: a[name] for name in a if name not in ("x", "wk")}
    return oracle.gradients(
        lambda x, wk: oracle.attention(x=x, wk=wk, **fixed, bug=bug), i["g"], x=a["x"], wk=a["wk"]
    )


def attention_gradient(rng, v):
    # In float64 and with small scores, so that no softmax is so sharp that its gradient is noise.
    i = attention_inputs(1, 3, 4, (2, 1, 2), "float64")(rng, v)
    return i | {"x": i["x"] / 2, "wq": i["wq"] / 2, "g": normal(rng, 1, 3, 4)}


def attention_masked(rng, v):
    mask = rng.random((2, 1, 5, 5)) < 0.5
    return attention_inputs(2, 5, 6, (2, 2, 4))(rng, v) | {"mask": mask | np.eye(5, dtype=bool)}


ATTENTION = Problem(
    name="attention",
    title="Grouped-query attention",
    file="dpo_minimal/llama.py",
    holes=("Attention.forward",),
    text="""Project x to queries (H heads), keys and values (G heads); turn queries and keys with
`rotate` (graded separately); softmax(q k^T / sqrt(K)) over the past and the token itself, or over
`mask` where one is given; head h uses key/value head h // (H / G). `cache`, if not None, keeps the
keys and values of earlier tokens: `cache.extend(k, v)` adds the new ones, [B, G, T, K] each, and
returns all, [B, G, S, K] each. Write the softmax yourself: `scaled_dot_product_attention` is
refused.""",
    checks=(
        Check(
            *("shape", 1, "attention", attention_inputs(2, 4, 6, (4, 2, 4)), expect_attention),
            "[B, T, D] in and out.",
        ),
        Check(
            *("hand value", 3, "attention", attention_inputs(1, 2, 2, (1, 1, 2)), expect_attention),
            "One head, two tokens: the first sees itself alone, the second both.",
        ),
        Check(
            *("invariant", 2, "attention", attention_inputs(1, 6, 4, (2, 2, 4)), expect_attention),
            "No token depends on a later one, and the scores have the right size.",
        ),
        Check(
            *("groups", 2, "attention", attention_inputs(2, 3, 6, (6, 2, 4)), expect_attention),
            "Neighbouring query heads share a key/value head: 0 0 0 1 1 1.",
        ),
        Check(
            *("gradient", 2, "attention", attention_gradient, expect_attention),
            "The gradients for x and k_proj agree with finite differences.",
            1e-4,
        ),
        Check(
            *("mask", 1, "attention", attention_masked, expect_attention),
            "`mask` says which key (column) a query (row) may see, instead of the causal rule.",
        ),
        Check(
            *("cache", 2, "attention"),
            *(attention_inputs(2, 5, 6, (4, 2, 4), split=3), expect_attention),
            "Three tokens at once and two more one by one give what all five at once give.",
        ),
        Check(
            *("float64", 1, "attention"),
            *(attention_inputs(1, 4, 4, (2, 1, 2), "float64"), expect_attention),
            "12 digits in float64: nothing is computed in float32.",
            1e-11,
        ),
    ),
    bugs={
        "not causal": "Tokens see later ones: the causal mask is missing.",
        "masked after the softmax": "Forbidden scores are 0; before a softmax that must be -inf.",
        "not scaled": "The scores are not divided by sqrt(K).",
        "divided by K": "The scores are divided by K, not by its root.",
        "scaled by the width": "The scores are divided by sqrt(D); it is the head's size K.",
        "heads in the wrong order": "Key/value heads are repeated as 0 1 0 1, not 0 0 1 1.",
        "v rotated": "Values are rotated too: only queries and keys carry positions.",
        "q not rotated": "The queries are not rotated.",
        "k not rotated": "The keys are not rotated.",
        "mask ignored": "The given mask is ignored.",
        "heads not put side by side": "Transpose back to [B, T, H, K] before joining the heads.",
    },
    banned=("scaled_dot_product_attention", "multi_head_attention_forward"),
)

PROBLEMS = (RMSNORM, ROTARY, ATTENTION)
