"""The default run: its table, and the curves of its DPO stage.

python figures/forum.py          reads runs/forum; runs train.py first if it is not there
python figures/forum.py --draw   draws again from the JSON
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import record

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "forum"
CURVES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def compute() -> dict:
    """What the default run found, and its DPO stage step by step."""
    if not (RUN / "eval.json").exists():
        subprocess.run([sys.executable, ROOT / "train.py"], cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text("utf-8").splitlines()]
    dpo = [row for row in rows if row["stage"] == "dpo"]
    steps = [row for row in dpo if "loss" in row]
    held_out = [row for row in dpo if "eval_loss" in row]
    sft = [row["loss"] for row in rows if row["stage"] == "sft"]
    return json.loads((RUN / "eval.json").read_text("utf-8")) | {
        "steps": {name: [row[name] for row in steps] for name in CURVES},
        "held_out_steps": {
            "step": [row["step"] for row in held_out],
            **{name: [row["eval_" + name] for row in held_out] for name in CURVES},
        },
        "sft_loss": {"first": sft[0], "last": sum(sft[-20:]) / 20},
        "peak_memory_gb": max(row["peak_memory_gb"] for row in rows),
    }


def draw(data: dict, plt):
    """Loss, rewards and accuracy against the step; dots are held-out pairs."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.1))
    held_out = data["held_out_steps"]

    def curve(axis, name, colour, text, place, below=False):
        values = smooth(data["steps"][name])
        axis.plot(values, color=colour)
        axis.plot(held_out["step"], held_out[name], "o", color=colour, markersize=5)
        record.label(axis, place, values[place], text, colour, (0, -18 if below else 9))

    curve(axes[0], "loss", record.BLUE, "loss", len(data["steps"]["loss"]) // 3)
    axes[0].axhline(math.log(2), color=record.GREY, linestyle=":")
    record.label(axes[0], len(data["steps"]["loss"]), math.log(2), "ln 2", record.GREY, (-4, -11))
    axes[0].set_title("The loss starts at ln 2")
    half = len(data["steps"]["loss"]) // 2
    curve(axes[1], "rewards/chosen", record.GREEN, "chosen", half)
    curve(axes[1], "rewards/rejected", record.RED, "rejected", half // 2)
    axes[1].axhline(0, color=record.GREY, linestyle=":")
    axes[1].set_title("The margin opens mostly downwards")
    axes[1].set_ylabel("reward (nats)")
    curve(axes[2], "rewards/accuracies", record.PURPLE, "accuracy", half, below=True)
    axes[2].axhline(data["vote_bound"], color=record.GREY, linestyle=":")
    record.label(axes[2], 0, data["vote_bound"], "the truth itself", record.GREY, (2, 4))
    axes[2].set_title("Accuracy ends where the votes' noise begins")
    for axis in axes:
        axis.set_xlabel("step (dots: held-out pairs)")
    figure.tight_layout()
    return figure


def smooth(values: list[float], window: int = 21) -> list[float]:
    """The mean of the values around each, of as many as there are near the ends."""
    spans = [values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


if __name__ == "__main__":
    record.main("forum", __doc__, compute, draw)
