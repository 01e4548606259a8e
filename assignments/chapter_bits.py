"""Problems 4 to 7: the 4-bit code, quantize, dequantize, the backward pass of a 4-bit layer."""

import numpy as np

import oracle
from ladder import Check, Problem, normal, only
from variants import Variant

FILE = "dpo_minimal/nf4.py"

# --- the code ---------------------------------------------------------------------------------


def no_inputs(rng, v):
    return {}


def expect_code(*names, at=None):
    def expect(i, v, bug=""):
        code = oracle.nf4_code(v, bug)
        # A few entries, picked by the grader from what comes back, are judged one rung at a time.
        values = {"code": code, "dtype": "float32"}
        return {name: values[name] for name in names}

    return expect


CODE = Problem(
    name="nf4_code",
    title="The NormalFloat code",
    file=FILE,
    holes=("nf4_code",),
    text="""{code} `linspace32` is given: space the probabilities with it, from the outermost to
0.5, and leave the last one (0.5 itself) out; turn them into quantiles with
`statistics.NormalDist().inv_cdf`; add an exact zero; round to float32, then divide by the largest
magnitude. Ascending, float32, the same bits on every machine.""",
    checks=(
        Check(
            *("four digits", 3, "nf4_code", no_inputs, expect_code("code", "dtype")),
            "Quantiles of the normal on both sides of an exact zero, ascending, the largest 1.",
            2e-4,
            visible=False,
        ),
        Check(
            *("every bit", 3, "nf4_code", no_inputs, expect_code("code", "dtype")),
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

# --- quantize ---------------------------------------------------------------------------------


def some_code(rng):
    """Sixteen ascending multiples of 1/64 with both ends and a zero: midpoints are exact."""
    inner = rng.choice(np.r_[-60:0, 1:60], 13, replace=False) / 64
    return np.sort(np.r_[-1, inner, 0, 1]).astype("float32")


def quantize_inputs(*shape, block_size=4, double_quant=False, dtype="float32", coarse=False):
    """coarse: each block holds a 1 and multiples of 1/128, so that ties occur."""

    def draw(rng, v):
        weight = normal(rng, *shape)
        if not coarse:  # in the first block the largest magnitude is a negative weight's
            flat = weight.reshape(-1)[:block_size]
            flat[np.abs(flat).argmax()] *= -np.sign(flat[np.abs(flat).argmax()])
        if double_quant:  # absmax in steps of 1/64: their sum is exact in any order
            flat = np.clip(weight.reshape(-1, block_size), -2, 2)
            flat[:, 0] = rng.integers(129, 512, len(flat)) / -64
            weight = flat.reshape(shape)
        if coarse:
            weight = (rng.integers(-128, 129, shape) / 128).astype("float32")
            weight[..., 0] = 1
        if dtype == "float16":
            weight = weight.astype("float16").astype("float32")
        named = {"block_size": block_size, "double_quant": double_quant, "dtype": dtype}
        return {"weight": weight.astype("float32"), "code": some_code(rng), **named}

    return draw


def expect_quantized(i, v, bug=""):
    named = {name: i[name] for name in ("weight", "code", "block_size", "double_quant")}
    out = oracle.quantize(**named, bug=bug)
    return out | {"shape": list(i["weight"].shape), "dtype": i["dtype"]}


def zeros_in(rng, v):
    i = quantize_inputs(3, 8, block_size=8)(rng, v)
    i["weight"][1] = 0
    i["weight"][2, 0] = -4
    return i


QUANTIZE = Problem(
    name="quantize",
    title="Quantize to 4 bits",
    file=FILE,
    holes=("nearest", "scaled_blocks", "quantize_nf4"),
    text="""Blocks of `block_size` over the row-major weight in float32, the last one filled up;
each divided by its largest magnitude (multiply by the reciprocal of absmax); the index of the
nearest entry of NF4_CODE, a tie to the lower one (do not write the 16 values into your code: the
grader puts other ones into NF4_CODE); two indices a byte, the first in the high nibble. With
`double_quant`, absmax minus its mean is quantized in the same way to 8 bits with DYNAMIC_CODE, in
blocks of ABSMAX_BLOCK. A block of zeros has absmax 0 and gives the code of 0, not NaN.""",
    checks=(
        Check(
            *("shape", 1, "quantize", quantize_inputs(3, 8), expect_quantized),
            "packed uint8 [n/2], absmax float32 [blocks], the weight's shape and dtype.",
        ),
        Check(
            *("hand value", 3, "quantize", quantize_inputs(1, 4), expect_quantized),
            "One block of four weights: absmax, nearest codes, two bytes, high nibble first.",
            1e-6,
        ),
        Check(
            *("blocks", 2, "quantize", quantize_inputs(6, 16, block_size=8), expect_quantized),
            "Blocks run along the rows, each with an absmax of its own.",
            1e-6,
        ),
        Check(
            *(
                "ties",
                1,
                "quantize",
                quantize_inputs(40, 8, block_size=8, coarse=True),
                expect_quantized,
            ),
            "Halfway between two codes goes to the lower one.",
            1e-6,
        ),
        Check(
            *("odd sizes", 1, "quantize", quantize_inputs(3, 5, dtype="float16"), expect_quantized),
            "15 weights are 8 bytes and 4 blocks; what fills them up is zero.",
            1e-6,
        ),
        Check(
            *("zeros", 1, "quantize", zeros_in, expect_quantized),
            "A block of zeros: absmax 0 and the index of the code 0, no NaN.",
            1e-6,
        ),
        Check(
            *(
                "double quantization",
                2,
                "quantize",
                quantize_inputs(300, 8, block_size=8, double_quant=True),
                expect_quantized,
            ),
            "300 absmax values: offset = their mean, two scales, codes of DYNAMIC_CODE.",
            1e-6,
        ),
    ),
    bugs={
        "low nibble first": "The nibbles are swapped: the first element belongs in the high one.",
        "largest, not largest magnitude": "absmax is the largest MAGNITUDE of a block.",
        "one absmax for all": "There is one absmax for the whole weight; each block has its own.",
        "columns first": "Blocks run down the columns; they run along the rows.",
        "the next lower code": "The next lower code is taken, not the nearest.",
        "ties go up": "Halfway between two codes the upper one is taken; it is the lower one.",
        "offset left out": "The mean of absmax is not taken off before 8 bits.",
    },
)

# --- dequantize -------------------------------------------------------------------------------


def dequantize_inputs(*shape, block_size=4, double=False, dtype="float32"):
    def draw(rng, v):
        n = int(np.prod(shape))
        blocks = -(-n // block_size)
        codes = rng.integers(0, 256, -(-n // 2)).astype("uint8")
        out = {"packed": codes, "shape": list(shape), "code": some_code(rng)}
        out |= {"block_size": block_size, "dtype": dtype}
        if not double:
            return out | {"absmax": rng.uniform(0.5, 3, blocks).astype("float32")}
        scale = rng.uniform(0.5, 2, -(-blocks // 256)).astype("float32")
        return out | {
            "absmax_codes": rng.integers(0, 256, blocks).astype("uint8"),
            "absmax_scale": scale,
            "absmax_offset": np.array(rng.uniform(2, 3), "float32"),
        }

    return draw


def expect_dequantized(i, v, bug=""):
    named = {name: i[name] for name in i if name != "dtype"}
    weight = oracle.dequantize(**named, bug=bug)
    weight = weight.astype(np.float16) if i["dtype"] == "float16" else weight
    return {"weight": weight.astype("float32"), "dtype": i["dtype"]}


DEQUANTIZE = Problem(
    name="dequantize",
    title="Dequantize",
    file=FILE,
    holes=("dequantize_absmax", "dequantize_nf4"),
    helpers=("code_pairs", "dequantize_fused", "select_code"),
    text="""`dequantize_absmax`: the stored absmax, or value = DYNAMIC_CODE[code] * scale + offset
with one scale for each ABSMAX_BLOCK values. `dequantize_nf4`: NF4_CODE[nibble] * absmax in float32,
high nibble first, and then one cast to the weight's dtype; an odd end of packed or a partial last
block is cut off. The helpers below it made the taught version faster; you need not write them.""",
    checks=(
        Check(
            *("shape", 1, "dequantize", dequantize_inputs(3, 8), expect_dequantized),
            "The weight's own shape and dtype.",
        ),
        Check(
            *("hand value", 3, "dequantize", dequantize_inputs(1, 4), expect_dequantized),
            "Two bytes and one absmax: four codes times absmax, high nibble first.",
            1e-7,
        ),
        Check(
            *(
                "blocks",
                2,
                "dequantize",
                dequantize_inputs(6, 16, block_size=8),
                expect_dequantized,
            ),
            "Eight neighbours share an absmax.",
            1e-7,
        ),
        Check(
            *("odd sizes", 1, "dequantize", dequantize_inputs(3, 5), expect_dequantized),
            "15 weights in 8 bytes and 4 blocks: nothing is left over.",
            1e-7,
        ),
        Check(
            *(
                "double quantization",
                3,
                "dequantize",
                dequantize_inputs(300, 8, block_size=8, double=True),
                expect_dequantized,
            ),
            "300 absmax codes: DYNAMIC_CODE times the scale of their 256, plus the offset.",
            1e-6,
        ),
        Check(
            *(
                "16 bits",
                1,
                "dequantize",
                dequantize_inputs(4, 8, dtype="float16"),
                expect_dequantized,
            ),
            "The product is taken in float32 and rounded once: every bit counts.",
            0.0,
        ),
    ),
    bugs={
        "low nibble first": "The nibbles are swapped: the high one is the first element.",
        "absmax left out": "The codes are not multiplied by absmax.",
        "neighbours share no block": "absmax is spread over the wrong elements (repeat, not tile).",
        "offset left out": "Double quantization's offset is not added back.",
        "one scale for all": "Only the first scale of absmax is used; each 256 have their own.",
        "blocks of 64 for absmax too": "absmax has blocks of 256, not of 64.",
    },
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
dequantized one: backward dequantizes again with `dequantize_nf4` (graded apart). W is cast to
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

PROBLEMS = (CODE, QUANTIZE, DEQUANTIZE, MATMUL)
TAUGHT = Variant()
