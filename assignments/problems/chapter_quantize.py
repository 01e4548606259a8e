"""Problems 5 and 6: weights to 4 bits and back."""

import numpy as np

from grader import oracle
from problems.ladder import Check, Problem, normal

FILE = "dpo_minimal/nf4.py"

# --- quantize ---------------------------------------------------------------------------------


def some_code(rng):
    """Sixteen ascending multiples of 1/64 with both ends and a zero: midpoints are exact."""
    inner = rng.choice(np.r_[-60:0, 1:60], 13, replace=False) / 64
    return np.sort(np.r_[-1, inner, 0, 1]).astype("float32")


def quantize_inputs(*shape, block_size=4, double_quant=False, dtype="float32", coarse=False):
    """coarse: each block holds a 1 and multiples of 1/128, so that ties occur."""

    def draw(rng, v):
        weight = normal(rng, *shape)
        if not coarse:  # in the first block a negative weight has the largest magnitude
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
    holes=("nearest", "scaled_blocks", "quantize_piece", "quantize_nf4"),
    text="""Blocks of `block_size` over the row-major weight in float32, the last one filled up;
each divided by its largest magnitude (multiply by the reciprocal of absmax); the index of the
nearest entry of NF4_CODE, a tie to the lower one (do not write the 16 values into your code: the
grader puts other ones into NF4_CODE); two indices per byte, the first in the high nibble. With
`double_quant`, absmax minus its mean is quantized in the same way to 8 bits with DYNAMIC_CODE, in
blocks of ABSMAX_BLOCK. A block of zeros has absmax 0 and gives the code of 0, not NaN. The result
is an NF4Weight, whose docstring names its fields; it carries no gradient. `piece_size` is for
speed: one piece is fine.""",
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
            "15 weights are 8 bytes and 4 blocks; what fills them up changes no absmax.",
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
    helpers={
        FILE: ("code_pairs",),
        "dpo_minimal/extras/compiled.py": ("dequantize_fused", "select_code"),
    },
    text="""`dequantize_absmax`: the stored absmax, or value = DYNAMIC_CODE[code] * scale + offset
with one scale for each ABSMAX_BLOCK values. `dequantize_nf4`: NF4_CODE[nibble] * absmax in float32,
high nibble first, and then one cast to the weight's dtype; an odd end of packed or a partial last
block is cut off. Three helpers made the taught version faster, and you need not write them:
`code_pairs`, and `dequantize_fused` and `select_code` in `extras/compiled.py`, a file that is not
handed in.""",
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
                dequantize_inputs(16, 32, dtype="float16"),
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

PROBLEMS = (QUANTIZE, DEQUANTIZE)
