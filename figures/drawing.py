"""The command line of an experiment: it writes a JSON file, and draws a figure from that file.

The SVG holds the sha256 of its JSON file, so that a test can check that they belong together.
"""

import hashlib
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the root, for the import below

from benchmarks.record import machine_record, script_parser, write_result

RESULTS = Path(__file__).parent / "results"
# Okabe & Ito's colours, which colour-blind readers can tell apart, in a fixed order.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"),
)
GREY = "#777777"
THIN = 15  # training steps per point of a thinned curve


def rounded(value, digits: int = 5):
    """The same value with every float rounded to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, (list, tuple)) else value


def main(name: str, description: str, compute, draw, digits: int = 5, show=None):
    """Write figures/results/NAME.json from compute(), then draw figures/NAME.svg with draw().

    With --draw the JSON file that is there is drawn again. digits: see `rounded`. show: makes
    tables of the result; such an experiment has --quick, which prints show(compute(quick=True)) and
    writes nothing.
    """
    parser = script_parser(description)
    parser.add_argument("--draw", action="store_true", help="only draw the existing JSON file")
    if show:
        parser.add_argument("--quick", action="store_true", help="a tiny version of it, no figure")
        compute = partial(compute, quick=False)
    args = parser.parse_args()
    path = RESULTS / f"{name}.json"
    if show and args.quick:
        print(show(compute(quick=True)))
        return
    if not args.draw:
        write_result(path, rounded({"made": machine_record()} | compute(), digits))
    if show:
        print(show(json.loads(path.read_text("utf-8"))))
    draw_result(path, draw)


def draw_result(path: Path, draw):
    """Draw figures/NAME.svg from figures/results/NAME.json, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print(f"no figure: pip install matplotlib, then the same command with --draw ({path.stem})")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    figure = draw(json.loads(path.read_text("utf-8")), plt)
    picture = path.parents[1] / f"{path.stem}.svg"
    about = {"Description": f"drawn from {path.name}, sha256 {digest}", "Date": None}
    figure.savefig(picture, metadata=about, bbox_inches="tight")
    print(f"drew {picture}")


def label(axis, x, y, text, colour, offset=(5, -3)):
    """Write a label beside a point in its colour, instead of a legend. The offset is in points."""
    place = dict(
        xytext=offset, textcoords="offset points", ha="left" if offset[0] >= 0 else "right"
    )
    axis.annotate(text, (x, y), color=colour, fontsize=8.5, **place)


def tuned_and_optimum(axis, tuned: dict, optimum: dict, x: str, colour, ring: float = 6):
    """Score against x of a policy ● and its optimum ○, with a dotted line between them.

    ring: the size of the ○ in points; rings of two sizes show even where they have one centre.
    """
    ends = [tuned[x], optimum[x]], [tuned["score"], optimum["score"]]
    axis.plot(*ends, ":", color=colour, linewidth=1)
    axis.plot(tuned[x], tuned["score"], "o", color=colour)
    place = optimum[x], optimum["score"]
    axis.plot(*place, "o", color=colour, markerfacecolor="none", markersize=ring)


def smooth(values: list[float], width: int) -> list[float]:
    """A moving mean over `width` values, and near the ends over fewer.

    Near the beginning both sides have the same number, so the first value stays as it is. At the
    end, where a single small batch would stand out, the later side has what there is.
    """
    halves = [min(width // 2, i) for i in range(len(values))]
    spans = [values[i - half : i + half + 1] for i, half in enumerate(halves)]
    return [sum(span) / len(span) for span in spans]


def thinned(rows: list[dict], name: str) -> list[float]:
    """Means of a metric over each THIN steps: less noise, and a smaller file."""
    half = THIN // 2
    return smooth([row[name] for row in rows], THIN)[half:-half:THIN]


def thinned_steps(values: list[float]) -> list[int]:
    """The steps in the middle of those that `thinned` made its values of."""
    return [THIN * i + THIN // 2 for i in range(len(values))]


# Text stays text, so that files are small. Equal data give equal files.
STYLE = {
    **{"svg.hashsalt": "dpo_minimal", "svg.fonttype": "none", "figure.facecolor": "white"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"},
    **{"axes.titlesize": 11, "font.size": 9.5, "axes.grid": True, "grid.color": "#e6e6e6"},
    **{"axes.axisbelow": True, "font.family": "DejaVu Sans", "lines.linewidth": 1.8},
}
