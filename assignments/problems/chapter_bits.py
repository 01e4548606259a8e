"""Problems 4 and 7: the 4-bit code, and the backward pass of a 4-bit layer."""

import numpy as np

from grader import oracle
from problems.ladder import Check, Problem, normal, only

FILE = "dpo_minimal/nf4.py"

# --- the code ---------------------------------------------------------------------------------


def no_inputs(rng, v):
    return {}


def expect_code(i, v, bug=""):
    return {"code": oracle.nf4_code(v, bug), "dtype": "float32"}


def expect_outline(i, v, bug=""):
    code = oracle.nf4_code(v, bug)
    ends = [float(code[0]), float(code[-1])]
    zeros = np.flatnonzero(code == 0).tolist()
    ascending = bool((np.diff(code) > 0).all())
    return {"length": len(code), "ends": np.array(ends), "zeros": zeros, "ascending": ascending}


CODE = Problem(
    name="nf4_code",
    title="The NormalFloat code",
    file=FILE,
    holes=("nf4_code",),
    text="""{code} `linspace32` is given: space the probabilities with it, from the outermost to
0.5, and leave the last one (0.5 itself) out; turn them into quantiles with
`statistics.NormalDist().inv_cdf`; add an exact zero; round to float32, then divide by the largest
magnitude. Ascending, float32, the same bits on every machine. Only the outline has a visible
test.""",
    checks=(
        Check(
            *("outline", 1, "nf4_outline", no_inputs, expect_outline),
            "Float32, ascending, with the right number of values, both ends and the zero in place.",
        ),
        Check(
            *("four digits", 2, "nf4_code", no_inputs, expect_code),
            "Quantiles of the normal on both sides of an exact zero, ascending, the largest 1.",
            2e-4,
            visible=False,
        ),
        Check(
            *("every bit", 3, "nf4_code", no_inputs, expect_code),
            "The same float32 bits as published: no rounded table, and float32 spacing.",
            0.0,
            visible=False,
        ),
    ),
    bugs={
        "sides swapped": "The numbers of values above and below zero are swapped.",
        "evenly spaced": "The values are evenly spaced: NormalFloat takes quantiles of the normal.",
        "not divided": "The quantiles are not divided by the largest.",
        "rounded to four digits": "This is a table rounded to four digits.",
        "spaced in float64": "Right to seven digits: space in float32 with `linspace32`.",
        "descending": "The values must ascend.",
    },
    changes={
        "NF4": "NF4: 16 values, 8 above zero, 7 below; the outermost probability is 0.9677083.",
        "NF3": "NF3, not NF4: 8 VALUES, 4 above zero, 3 below; outermost 0.9330357.",
        "mirrored": "A mirrored NF4: 7 values ABOVE zero and 8 BELOW; outermost 0.9677083.",
    },
    at_import={"nf4_code": "torch.linspace(-1, 1, 16)"},
)

# --- the 4-bit linear layer -------------------------------------------------------------------


def matmul_inputs(*shape, out, dtype="float32", backward=True):
    def draw(rng, v):
        x = normal(rng, *shape, dtype=dtype)
        W, g = normal(rng, out, shape[-1]), normal(rng, *shape[:-1], out)
        return {"x": x, "W": W, "dtype": dtype} | ({"g": g} if backward else {})

    return draw


def expect_matmul(*names):
    def expect(i, v, bug=""):
        a = only(i, "x", "W", "g")
        square = a["W"].shape[0] == a["W"].shape[1]
        out = oracle.nf4_matmul(**a, bug=bug if square or "transposed" not in bug else "")
        out |= {"dtype": i["dtype"], "W kept": bug == "W kept by autograd"}
        again = 0 if bug in ("W kept by autograd", "W kept aside") else 1
        out |= {"dequantized in forward": 1, "in backward": again}
        return {name: out[name] for name in names}

    return expect


MATMUL = Problem(
    name="nf4_backward",
    title="The backward pass of a 4-bit layer",
    file=FILE,
    holes=("NF4Matmul.forward", "NF4Matmul.backward"),
    text="""An autograd function for y = x W^T with W in 4 bits: forward dequantizes W, backward
gives the gradient for x (and None for the weight, which is frozen). Keep the packed weight, not the
dequantized one; backward dequantizes again with `dequantize_nf4` (graded separately). W is cast to
the dtype of what it is multiplied with.""",
    checks=(
        Check(
            *(
                "shape",
                1,
                "nf4_matmul",
                matmul_inputs(2, 3, out=4, backward=False),
                expect_matmul("y", "dtype"),
            ),
            "y is [..., out] in x's dtype.",
        ),
        Check(
            *(
                "hand value",
                1,
                "nf4_matmul",
                matmul_inputs(1, 2, out=2, backward=False),
                expect_matmul("y"),
            ),
            "y = x W^T.",
        ),
        Check(
            *("gradient", 2, "nf4_matmul", matmul_inputs(2, 3, out=3), expect_matmul("d x")),
            "The gradient for x is grad_y W, here with a square W.",
        ),
        Check(
            *(
                "more axes",
                1,
                "nf4_matmul",
                matmul_inputs(2, 3, 4, out=5),
                expect_matmul("y", "d x"),
            ),
            "x may have any number of axes in front.",
        ),
        Check(
            *(
                "memory",
                2,
                "nf4_matmul",
                matmul_inputs(2, 7, out=5),
                expect_matmul("W kept", "dequantized in forward", "in backward", "d x"),
            ),
            "W is dequantized once in forward and once in backward, and kept by nobody between.",
        ),
        Check(
            *(
                "16 bits",
                1,
                "nf4_matmul",
                matmul_inputs(4, 8, out=8, dtype="float16"),
                expect_matmul("y", "d x", "dtype"),
            ),
            "Both passes run in the dtype of x and give it back.",
            6e-3,
        ),
    ),
    bugs={
        "forward transposed": "Forward multiplies by W; it is x W^T.",
        "backward transposed": "Backward multiplies by W^T; it is grad_y W.",
        "no gradient": "No gradient reaches x: LoRA below this layer would not learn.",
        "twice the gradient": "The gradient is twice what it should be.",
        "W kept by autograd": "Autograd keeps the dequantized W: 13 GB in a 7B model.",
        "W kept aside": "The dequantized W is kept from forward to backward: dequantize again.",
    },
)
