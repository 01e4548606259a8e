"""A picture of runs: what metrics.jsonl and eval.json hold, one panel per quantity.

    python -m dpo_minimal.plot RUN               writes RUN/plot.png
    python -m dpo_minimal.plot RUN RUN ...       the runs in one picture: plot.png, here

A colour is a run, or chosen and rejected where there is only one run. Held-out pairs are circles.
The background is white whatever is around it, so that the picture looks the same on a dark page.
"""

import argparse
import json
import math
from pathlib import Path

from dpo_minimal import InputError
from dpo_minimal.extras.command_line import refuse, whole
from dpo_minimal.extras.reading import read_json
from dpo_minimal.files import whole_file

# Okabe & Ito's colours, which colour-blind readers can tell apart, and grey.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#555555"]
DASHES = ["-", (0, (4, 1.5))]
PANELS = [  # stage, metrics, title, unit
    ("pretrain", ["loss"], "Pretraining: loss", "nats per token"),
    ("sft", ["loss"], "SFT: loss", "nats per token"),
    ("dpo", ["loss"], "DPO: loss", "per pair"),
    ("dpo", ["rewards/margins"], "DPO: reward margin", "nats"),
    ("dpo", ["rewards/accuracies"], "DPO: reward accuracy", "share of pairs"),
    ("dpo", ["rewards/chosen", "rewards/rejected"], "DPO: rewards", "nats"),
    ("dpo", ["logps/chosen", "logps/rejected"], "DPO: log-probabilities", "nats per answer"),
]
SMOOTH = 15  # a line is a running mean over a 15th of its stage's steps
STYLE = {
    **{"figure.facecolor": "white", "axes.facecolor": "white", "font.family": "DejaVu Sans"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True},
    **{"grid.color": "#e6e6e6", "axes.axisbelow": True, "axes.titlelocation": "left"},
    **{"axes.titlesize": 10.5, "font.size": 9, "axes.edgecolor": "#888888"},
}


def main():
    """Draw the runs that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m dpo_minimal.plot", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.error = refuse
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", help="picture: .png, .svg or .pdf")
    smooth = "steps per mean (a 15th of a stage); 1: every step as it is"
    parser.add_argument("--smooth", type=whole(1), help=smooth)
    args = parser.parse_args()
    folders = [Path(run) for run in args.runs]
    picture = Path(args.out or (folders[0] / "plot.png" if len(folders) == 1 else "plot.png"))
    draw_runs(folders, picture, args.smooth)
    print(f"drew {picture}")


def draw_curves(folder: Path, log=print):
    """Draw curves.png of a run that ends; without matplotlib, or with damaged rows, say so."""
    try:
        draw_runs([folder], folder / "curves.png")
    except InputError as error:
        log(f"curves    not drawn: {error}")


def draw_runs(folders: list[Path], picture: Path, smooth: int | None = None):
    """Draw runs as one picture. smooth: how many steps a line's mean is over; None: see SMOOTH.

    InputError without matplotlib, for a folder that is no run, for a damaged row of metrics.
    """
    if picture.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--out {picture}: give a name that ends in .png, .svg or .pdf")
    if len(folders) > len(COLOURS):
        raise InputError(f"{len(folders)} runs: a picture has colours for {len(COLOURS)} at most")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"{picture.name} needs matplotlib: pip install matplotlib") from None
    runs = {name: read_rows(path) for name, path in zip(names(folders), folders, strict=True)}
    results = [read_results(path) for path in folders]
    panels = [panel for panel in PANELS if any(curve(rows, *panel[:2]) for rows in runs.values())]
    if not panels:
        raise InputError(f"{folders[0]}: its metrics.jsonl has no steps yet")
    count = len(panels) + any(kl_bars(result) for result in results)
    columns = math.ceil(count / 2) if count > 3 else count
    with matplotlib.rc_context(STYLE):
        size = (3.5 * columns, 3 * math.ceil(count / columns) + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(math.ceil(count / columns), columns, squeeze=False).flat
        for axis, panel in zip(grid, panels, strict=False):
            draw_panel(axis, panel, list(runs.values()), smooth)
        if count > len(panels):
            draw_kl(grid[len(panels)], results)
        for axis in grid[count:]:
            axis.set_visible(False)
        draw_legend(figure, list(runs), columns)
        with whole_file(picture) as file:
            figure.savefig(file, format=picture.suffix[1:], dpi=85)


def names(folders: list[Path]) -> list[str]:
    """A name for each run: its folder's, or the whole path where two folders are namesakes."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def read_rows(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl. A last line without an end is still being written."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{folder}: no metrics.jsonl: give the folder of a run that trained")
    try:
        lines = path.read_text("utf-8").split("\n")[:-1]
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file: it is damaged") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            values = [value for name, value in row.items() if name != "stage"]
            sound = isinstance(row["stage"], str) and isinstance(row["step"], int)
        except (ValueError, KeyError, AttributeError, RecursionError):
            sound, values = False, []
        if not sound or not all(isinstance(value, int | float) for value in values):
            raise InputError(f"{path}, line {number}: not a row of metrics; delete the line")
        rows.append(row)
    return rows


def read_results(folder: Path) -> dict:
    """A run's eval.json; empty if the run was not evaluated yet."""
    path = folder / "eval.json"
    return read_json(path) if path.exists() else {}


def curve(rows: list[dict], stage: str, metrics: list[str], prefix="") -> list[list[tuple]]:
    """For each metric its points (step, value); empty if there is none."""
    of_stage = [row for row in rows if row["stage"] == stage]
    points = [[(r["step"], r[prefix + m]) for r in of_stage if prefix + m in r] for m in metrics]
    return points if any(points) else []


def running_mean(values: list[float], width: int) -> list[float]:
    """Means over the `width` values around each, over fewer near the ends."""
    half = width // 2
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def draw_panel(axis, panel, runs: list[list[dict]], smooth: int | None):
    """Each metric of each run: a line over the steps, and circles for held-out pairs."""
    stage, metrics, title, unit = panel
    for number, rows in enumerate(runs):
        for kind, points in enumerate(curve(rows, stage, metrics)):
            colour = COLOURS[number if len(runs) > 1 else kind]
            steps, values = zip(*points, strict=True) if points else ((), ())
            width = smooth or max(1, len(steps) // SMOOTH)
            if len(runs) == 1 and width > 1:  # with more runs these would hide one another
                axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
            means = running_mean(values, width)
            axis.plot(steps, means, linestyle=DASHES[kind], color=colour, linewidth=1.6)
        for kind, points in enumerate(curve(rows, stage, metrics, prefix="eval_")):
            colour = COLOURS[number if len(runs) > 1 else kind]
            place = dict(markersize=6, markeredgecolor="black", markeredgewidth=0.8, zorder=4)
            axis.plot(*zip(*points, strict=True), "o", color=colour, **place)
    axis.set_title(title)
    axis.set_ylabel(unit)
    axis.set_xlabel("step")


def kl_bars(result: dict) -> dict[str, float]:
    """{model: its KL to the reference}, from an eval.json. The reference itself, 0, is left out."""
    bars = {}
    for name, row in result.get("table", {}).items():
        for reference in ("SFT", "base"):
            value = row.get(f"kl_to_{reference.lower()}")
            if value is not None and name != reference:
                bars[f"{name} to {reference}"] = value
    return bars


def draw_kl(axis, results: list[dict]):
    """Bars with their values: how far each model's answers are from the reference's."""
    bars = [kl_bars(result) for result in results]
    kinds = list(dict.fromkeys(kind for of_run in bars for kind in of_run))
    height = 0.8 / len(results)
    for number, of_run in enumerate(bars):
        colour = COLOURS[number]
        places = [kinds.index(kind) + height * (number + 0.5) - 0.4 for kind in of_run]
        drawn = axis.barh(places, list(of_run.values()), 0.9 * height, color=colour)
        axis.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8.5)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.grid(axis="y", visible=False)
    axis.set_title("Evaluation: KL of the answers")
    axis.set_xlabel("nats per answer")


def draw_legend(figure, runs: list[str], columns: int):
    """What colours, dashes and circles mean, above all panels, so that it covers none."""
    from matplotlib.lines import Line2D

    several, grey = len(runs) > 1, "#555555"
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    lines = []
    if several:
        lines = [Line2D([], [], color=COLOURS[i], label=run) for i, run in enumerate(runs)]
    else:
        figure.suptitle(runs[0], x=0.01, ha="left", fontsize=12, fontweight="bold")
    for kind, name in enumerate(["chosen, or all", "rejected"]):
        colour = grey if several else COLOURS[kind]
        lines.append(Line2D([], [], color=colour, linestyle=DASHES[kind], label=name))
    circle = dict(marker="o", linestyle="", markeredgecolor="black", markeredgewidth=0.8)
    lines.append(Line2D([], [], color=grey, label="held-out pairs", **circle))
    if not several:
        lines.append(Line2D([], [], color=grey, alpha=0.4, linewidth=0.8, label="every step"))
    lines.append(Line2D([], [], linestyle="", label="(lines: running means)"))
    place = "outside upper left" if several else "outside upper right"
    figure.legend(handles=lines, loc=place, ncols=2 * columns, frameon=False)
