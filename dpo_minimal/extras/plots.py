"""Curves of a run, where matplotlib is installed."""

import json
from pathlib import Path

PANELS = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm")


def draw_curves(metrics, picture, log=print):
    """Draw a metrics.jsonl as curves.png: the loss of every stage, the rewards of DPO."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        log("curves    not drawn: pip install matplotlib for curves.png")
        return
    rows = [json.loads(line) for line in Path(metrics).read_text("utf-8").splitlines()]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure, axes = plt.subplots(len(stages), len(PANELS), figsize=(15, 2.8 * len(stages)))
    for line, stage in zip(axes.reshape(len(stages), -1), stages, strict=True):
        for axis, name in zip(line, PANELS, strict=True):
            for prefix, style in (("", "-"), ("eval_", "o")):
                points = [
                    (r["step"], r[prefix + name])
                    for r in rows
                    if r["stage"] == stage and prefix + name in r
                ]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        style,
                        label="held out" if prefix else "training",
                    )
            axis.set_title(f"{stage}: {name}")
            axis.set_xlabel("step")
            axis.set_visible(bool(axis.lines))
            if axis.lines:
                axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=100)
    plt.close(figure)
