"""Problems 8 and 9: LoRA's forward pass, and merging."""

import math

import numpy as np

from grader import oracle
from problems.ladder import Check, Problem, normal, only

FILE = "dpo_minimal/lora.py"

# --- LoRA -------------------------------------------------------------------------------------


def lora_inputs(*shape, out, ranks, active, dtype="float32", frozen=(), names="pqs"):
    def draw(rng, v):
        into, factors = shape[-1], list(names[: len(ranks)])
        i = {"x": normal(rng, *shape, dtype=dtype), "W": normal(rng, out, into, dtype=dtype)}
        i |= {"factors": factors, "alpha": float(rng.uniform(3, 9)), "ranks": list(ranks)}
        for name, r in zip(factors, ranks, strict=True):
            i |= {f"A {name}": normal(rng, r, into), f"B {name}": normal(rng, out, r)}
        return i | {"active": list(active), "frozen": list(frozen), "dtype": dtype}

    return draw


def expect_lora(i, v, bug=""):
    # W's gradient is not asked for: the base is frozen.
    a = {name: value for name, value in only(i, *i).items() if name not in ("g", "dtype", "frozen")}
    if "g" not in i:
        return {"y": oracle.lora(**a, v=v, bug=bug), "dtype": i["dtype"]}
    leaves = {name: a.pop(name) for name in list(a) if name[0] in "xAB"}
    return oracle.gradients(
        lambda **moved: oracle.lora(**a, **moved, v=v, bug=bug), i["g"], **leaves
    )


def lora_gradient(rng, v):
    return lora_inputs(2, 3, out=2, ranks=(1, 2), active="pq")(rng, v) | {"g": normal(rng, 2, 2)}


def new_inputs(rng, v):
    return {"sizes": [int(rng.integers(200, 400)), 30, 16], "alpha": 8.0}


def expect_new(i, v, bug=""):
    into, out, r = i["sizes"]
    bound = {"A starts too large": 1.0}.get(bug, 1 / math.sqrt(into))
    return {
        "A shape": [r, into],
        "A dtype": "float32",
        "B": np.zeros((out, r)),
        "trained": True,
        "largest A": np.array(bound),
        "mean square of A": np.array(bound**2 / 3),
        "noise in training": bug != "no dropout",
        "noise in evaluation": bug == "dropout in evaluation",
    }


LORA = Problem(
    name="lora",
    title="LoRA",
    file=FILE,
    holes=("Adapter.__init__", "Adapter.forward", "LoRALinear.forward"),
    text="""`Adapter`: parameters `lora_A` [r, in], uniform in +-1/sqrt(in), and `lora_B` [out, r],
zero, both float32; `scale` = {lora}; and `dropout`. Its forward is scale * B A x, with dropout
on x in training, but never on a frozen adapter (`lora_A.requires_grad` is False): it is part of
the reference. `LoRALinear` adds the adapters named in `active` to its base, in x's dtype.""",
    checks=(
        Check(
            *("shape", 1, "lora", lora_inputs(2, 3, 4, out=5, ranks=(2,), active="p"), expect_lora),
            "[..., in] to [..., out] in x's dtype.",
        ),
        Check(
            *("start", 2, "new_adapter", new_inputs, expect_new),
            "A is float32 in +-1/sqrt(in), B zero; dropout acts in training and not in evaluation.",
            0.03,
        ),
        Check(
            *(
                "hand value",
                2,
                "lora",
                lora_inputs(1, 2, out=2, ranks=(2,), active="p"),
                expect_lora,
            ),
            "y = W x + scale * B A x, one number at a time.",
        ),
        Check(
            *(
                "several adapters",
                1,
                "lora",
                lora_inputs(3, 4, out=5, ranks=(3, 1, 2), active="ps"),
                expect_lora,
            ),
            "Of three adapters of different ranks, the two active ones act, each with its scale.",
        ),
        Check(
            *("gradient", 2, "lora", lora_gradient, expect_lora),
            "Gradients reach x, A and B of both adapters.",
        ),
        Check(
            *(
                "frozen",
                1,
                "lora",
                lora_inputs(4, 6, out=3, ranks=(4, 2), active="pq", frozen="p"),
                expect_lora,
            ),
            "A frozen adapter is exact in training mode: no dropout in the reference.",
        ),
        Check(
            *(
                "16 bits",
                1,
                "lora",
                lora_inputs(4, 6, out=3, ranks=(4,), active="p", dtype="float16"),
                expect_lora,
            ),
            "x in 16 bits: the float32 adapter follows, and y has x's dtype.",
            6e-3,
        ),
    ),
    bugs={
        "alpha alone": "The update is scaled by alpha; its rank is not divided by.",
        "other scale": "The scale follows the other rule (r or its root): read the problem again.",
        "no scale": "The update is not scaled at all.",
        "r / alpha": "The scale is upside down.",
        "only the first": "Only the first active adapter acts: they add up.",
        "only the last": "Only the last active adapter acts: they add up.",
        "inactive ones act": "Adapters that are not active act too.",
        "base left out": "The base layer's output is missing.",
        "A starts too large": "A starts in +-1; it should be +-1/sqrt(in).",
        "no dropout": "Dropout never acts.",
        "dropout in evaluation": "Dropout acts in evaluation too.",
    },
    changes={
        "alpha/r": "alpha / r",
        "alpha/sqrt(r)": "alpha / SQRT(r), the rank-stabilized one, not the taught one",
    },
)

# --- merging ----------------------------------------------------------------------------------


def merge_inputs(out, into, ranks, active, stored="plain", dtype="float32"):
    def draw(rng, v):
        names = list("pqs"[: len(ranks)])
        i = {"W": normal(rng, out, into), "names": names, "active": list(active)}
        if dtype == "float16":
            i["W"] = i["W"].astype("float16").astype("float32")
        for name, r in zip(names, ranks, strict=True):
            i |= {f"A {name}": normal(rng, r, into), f"B {name}": normal(rng, out, r)}
        scales = [float(s) for s in rng.uniform(0.3, 3, len(ranks))]
        return i | {"scales": scales, "stored": stored, "dtype": dtype}

    return draw


def expect_merged(i, v, bug=""):
    a = {name: value for name, value in only(i, *i).items() if name not in ("stored", "dtype")}
    weight = oracle.merge(**a, bug=bug)
    if bug == "16-bit sum":
        weight = weight.astype(i["dtype"]).astype("float64")
    return {"weight": weight, "dtype": "float32", "grad": bug == "not detached"}


MERGE = Problem(
    name="merge",
    title="Merge",
    file=FILE,
    holes=("Adapter.delta", "merged_weight"),
    text="""`delta`: the update as a matrix, scale * B A. `merged_weight`: a layer's weight plus the
deltas of its active adapters, float32, detached. Where the layer is in 4 bits, the weight is the
dequantized one (`dequantize_nf4`, graded separately), since the adapters were trained over it;
the sum is not quantized again. For a layer without adapters it is the plain weight.""",
    checks=(
        Check(
            *("shape", 1, "merge", merge_inputs(4, 6, (2,), "p"), expect_merged),
            "[out, in], float32, without a graph.",
        ),
        Check(
            *("hand value", 1, "merge", merge_inputs(2, 2, (1,), "p"), expect_merged),
            "W + scale * B A.",
        ),
        Check(
            *("several adapters", 2, "merge", merge_inputs(5, 4, (3, 1, 2), "ps"), expect_merged),
            "The two active ones of three, each with its scale.",
        ),
        Check(
            *("4 bits", 2, "merge", merge_inputs(4, 8, (2, 2), "pq", "NF4"), expect_merged),
            "Over NF4 the sum is dequantize(W) + deltas, and stays in float32.",
        ),
        Check(
            *(
                "16 bits",
                1,
                "merge",
                merge_inputs(4, 8, (2,), "p", "plain", "float16"),
                expect_merged,
            ),
            "A 16-bit weight is widened before the sum.",
            1e-6,
        ),
    ),
    bugs={
        "inactive ones too": "Adapters that are not active are merged too.",
        "only the first": "Only the first active adapter is merged.",
        "update lost": "The update is lost: 4 bits are too coarse for it. Do not quantize again.",
        "transposed": "The update is transposed: B A is [out, in].",
        "scale left out": "The update is not scaled.",
        "scale twice": "The update is scaled twice.",
        "16-bit sum": "The sum is rounded to 16 bits.",
        "not detached": "The merged weight still carries a graph: detach it.",
    },
)

PROBLEMS = (LORA, MERGE)
