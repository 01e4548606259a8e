"""The time of dequantizing NF4: our code, our code compiled, and bitsandbytes if it is installed.

    python benchmarks/dequantize.py

The sides take turns in every round, so that a machine that slows down favours none. The table shows
medians. Before that, every result is compared bit for bit with the definition: code * absmax in
float32, then one cast.
"""

import argparse
import statistics
import sys
from functools import partial

import torch
from record import save, script_parser
from step import seconds_of

from dpo_minimal.nf4 import (
    NF4_CODE,
    NF4Weight,
    dequantize_absmax,
    dequantize_nf4,
    quantize_nf4,
)


def definition(weight: NF4Weight) -> torch.Tensor:
    """The dequantized weight, computed in the plainest way."""
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), dim=1).flatten().long()
    values = NF4_CODE.to(nibbles.device)[nibbles].view(-1, weight.block_size)
    values = values * dequantize_absmax(weight)[:, None]
    return values.flatten().view(weight.shape).to(weight.dtype)


def bitsandbytes_side(weight: torch.Tensor):
    """(function that dequantizes its own codes, the same codes as our NF4Weight), or None.

    None if bitsandbytes is not installed.
    """
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return None
    options = {"quant_type": "nf4", "compress_statistics": True, "blocksize": 64}
    packed, state = bnb.quantize_4bit(weight, **options)
    # Its quantizer may choose other absmax codes than ours, so we compare with what it chose.
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    ours = NF4Weight(packed.flatten(), tuple(weight.shape), weight.dtype, 64, absmax.flatten())
    return partial(bnb.dequantize_4bit, packed, state), ours


def make_sides(weight: torch.Tensor, compiled: bool) -> dict:
    """{name: (function to time, what it has to return)}."""
    quantized = quantize_nf4(weight)
    expected = definition(quantized)
    sides = {"ours": (partial(dequantize_nf4, quantized), expected)}
    if compiled:
        sides["ours, compiled"] = (partial(torch.compile(dequantize_nf4), quantized), expected)
    theirs = bitsandbytes_side(weight)
    if theirs:
        sides["bitsandbytes"] = (theirs[0], definition(theirs[1]))
    copied = expected.clone()
    sides["copying the result"] = (partial(copied.copy_, expected), expected)
    return sides


def show(figures: dict):
    """Print the table. Ratios are to the time of bitsandbytes, or without it to our own."""
    unit = "bitsandbytes" if "bitsandbytes" in figures else "ours"
    print(f"{'':22}{'ms':>10}{'times ' + unit:>22}{'weights/s':>12}{'exact':>8}")
    for name, figure in figures.items():
        ratio = figure["seconds"] / figures[unit]["seconds"]
        rate, exact = figure["weights_per_second"], "yes" if figure["exact"] else "NO"
        print(f"{name:22}{figure['seconds'] * 1e3:>10.2f}{ratio:>22.2f}{rate:>12.2e}{exact:>8}")


def read_arguments() -> argparse.Namespace:
    """The flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--shape", nargs=2, type=int, default=[4096, 4096], help="rows (out) and columns (in)")
    add("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    add("--rounds", type=int, default=50)
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", help="write the figures to this file")
    return parser.parse_args()


def main():
    """The command line: print the table, and write the figures if --json is given."""
    args = read_arguments()
    torch.set_num_threads(args.threads)
    weight = torch.randn(args.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    weight = weight.to(args.device, getattr(torch, args.dtype))
    sides = make_sides(weight, args.compile)
    exact = {name: torch.equal(run(), expected) for name, (run, expected) in sides.items()}
    times = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, (run, _) in sides.items():
            times[name].append(seconds_of(run))
    figures = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rate = weight.numel() / median
        figures[name] = {"seconds": median, "weights_per_second": rate, "exact": exact[name]}
    show(figures)
    save(args, {"figures": figures, "seconds_all": times})
    return not all(exact.values())


if __name__ == "__main__":
    sys.exit(main())
