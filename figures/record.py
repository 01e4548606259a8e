"""The two files of an experiment: its JSON, and the figure that is drawn from that JSON.

The SVG holds the sha256 of the JSON that it shows, so that a test can tell whether they agree.
"""

import argparse
import datetime
import hashlib
import json
import platform
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# Okabe & Ito's colours, told apart by colour-blind readers, in a fixed order.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"),
)
GREY = "#777777"


def rounded(value, digits: int = 5):
    """The same value with every float at so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, (list, tuple)) else value


def main(name: str, description: str, compute, draw):
    """The command line of an experiment: compute() gives what the JSON holds, draw(data) a figure.

    Without --draw it computes and writes figures/results/NAME.json; then figures/NAME.svg is drawn.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("--draw", action="store_true", help="only draw the JSON that is there")
    args = parser.parse_args()
    path = RESULTS / f"{name}.json"
    if not args.draw:
        write_result(path, compute())
    draw_result(path, draw)


def write_result(path: Path, data: dict):
    """Write an experiment's numbers, with what made them, a line for each entry of data."""
    import torch

    made = {
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    RESULTS.mkdir(exist_ok=True)
    lines = [
        f"{json.dumps(str(k))}: {json.dumps(rounded(v))}"
        for k, v in ({"made": made} | data).items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    print(f"written   {path}")


def draw_result(path: Path, draw):
    """Draw figures/NAME.svg from figures/results/NAME.json, if matplotlib is here."""
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
    print(f"drawn     {picture}")


def label(axis, x, y, text, colour, offset=(5, -3)):
    """A label beside a point, in the point's colour: no legend to look up. Offset in points."""
    place = dict(
        xytext=offset, textcoords="offset points", ha="left" if offset[0] >= 0 else "right"
    )
    axis.annotate(text, (x, y), color=colour, fontsize=8.5, **place)


# Text stays text, so that files are small; equal data give equal files.
STYLE = {
    **{"svg.hashsalt": "dpo_minimal", "svg.fonttype": "none", "figure.facecolor": "white"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"},
    **{"axes.titlesize": 11, "font.size": 9.5, "axes.grid": True, "grid.color": "#e6e6e6"},
    **{"axes.axisbelow": True, "font.family": "DejaVu Sans", "lines.linewidth": 1.8},
}
