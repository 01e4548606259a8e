"""Curves of a run, where matplotlib is installed."""

import json
import math
from pathlib import Path

REWARDS = [["rewards/chosen", "rewards/rejected"], ["rewards/margins"], ["rewards/accuracies"]]


def draw_curves(metrics, picture, log=print):
    """Draw a metrics.jsonl as a picture: the loss of every stage, then the rewards of DPO."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        log("curves    not drawn: pip install matplotlib for curves.png")
        return
    rows = [json.loads(line) for line in Path(metrics).read_text("utf-8").splitlines()]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    panels = [(stage, ["loss"]) for stage in stages] + [("dpo", names) for names in REWARDS]
    figure, axes = plt.subplots(math.ceil(len(panels) / 3), 3, figsize=(13, 7), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (stage, names) in zip(axes.flat, panels, strict=False):
        draw_panel(axis, [row for row in rows if row["stage"] == stage], names)
        axis.set_title(f"{stage}: {', '.join(names)}")
    figure.tight_layout()
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def draw_panel(axis, rows, names):
    """Each metric as a line over the steps, its held-out values as points of the same colour."""
    for number, name in enumerate(names):
        for prefix, style in (("", "-"), ("eval_", "o")):
            points = [(row["step"], row[prefix + name]) for row in rows if prefix + name in row]
            if points:
                label = f"{name.split('/')[-1]}{', held out' if prefix else ''}"
                edge = {"markeredgecolor": "black"} if prefix else {"linewidth": 1}
                axis.plot(
                    *zip(*points, strict=True), style, color=f"C{number}", label=label, **edge
                )
    axis.set_xlabel("step")
    axis.legend(frameon=False)
