"""The default run: its table, and the curves of its DPO stage.

python figures/forum.py          reads runs/forum, and runs train.py first if it is not there
python figures/forum.py --draw   draws again from the JSON file
"""

import json
import math

from drawing import BLUE, GREEN, GREY, PURPLE, RED, label, main, smooth

from benchmarks.record import TRAIN, read_log, run_script

RUN = TRAIN.parent / "runs" / "forum"
SMOOTH = 21  # steps per mean; fewer near the ends, so that the first point is step 0 itself
CURVES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def compute() -> dict:
    """What the default run reports, and its DPO stage step by step."""
    if not (RUN / "eval.json").exists():
        run_script(TRAIN, cwd=TRAIN.parent)
    log = read_log(RUN / "metrics.jsonl")
    steps, held_out = log["dpo"]
    sft = [row["loss"] for row in log["sft"][0]]
    rows = [row for stage in log.values() for part in stage for row in part]
    return json.loads((RUN / "eval.json").read_text("utf-8")) | {
        "steps": {name: [row[name] for row in steps] for name in CURVES},
        "held_out_steps": {
            "step": [row["step"] for row in held_out],
            **{name: [row[name] for row in held_out] for name in CURVES},
        },
        "sft_loss": {"first": sft[0], "last": sum(sft[-20:]) / 20},
        "peak_memory_gb": max(row["peak_memory_gb"] for row in rows),
    }


def draw(data: dict, plt):
    """Loss, rewards and accuracy against the step. Dots are held-out pairs.

    Accuracy has no value at step 0, where all pairs are ties and count as wrong.
    """
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.1))
    held_out = data["held_out_steps"]

    def curve(axis, name, colour, text, place, below=False):
        first = int(name == "rewards/accuracies")
        values = smooth(data["steps"][name][first:], SMOOTH)
        axis.plot(range(first, first + len(values)), values, color=colour)
        dots = held_out["step"][first:], held_out[name][first:]
        axis.plot(*dots, "o", color=colour, markersize=5)
        label(axis, place, values[place], text, colour, (0, -18 if below else 12))

    curve(axes[0], "loss", BLUE, "training", len(data["steps"]["loss"]) // 4)
    label(axes[0], held_out["step"][-1], held_out["loss"][-1], "held out", BLUE, (2, 7))
    axes[0].set_ylabel("loss per pair")
    axes[0].axhline(math.log(2), color=GREY, linestyle=":")
    label(axes[0], len(data["steps"]["loss"]), math.log(2), "ln 2", GREY, (-4, -11))
    axes[0].set_title("The loss starts at ln 2")
    half = len(data["steps"]["loss"]) // 2
    curve(axes[1], "rewards/chosen", GREEN, "chosen", half)
    curve(axes[1], "rewards/rejected", RED, "rejected", half // 2)
    axes[1].axhline(0, color=GREY, linestyle=":")
    axes[1].set_title("The margin opens mostly downwards")
    axes[1].set_ylabel("reward (nats)")
    curve(axes[2], "rewards/accuracies", PURPLE, "training", half, below=True)
    axes[2].set_ylabel("share of pairs ranked right")
    axes[2].axhline(data["truth"]["accuracy"], color=GREY, linestyle=":")
    label(axes[2], 0, data["truth"]["accuracy"], "the truth itself", GREY, (2, 4))
    axes[2].set_title("Accuracy nears the votes' noise")
    for axis in axes:
        axis.set_xlabel("step")
    note = f"lines: training, means of {SMOOTH} steps; dots: held-out pairs"
    figure.text(0.01, 0.005, note, fontsize=8.5, color=GREY)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


if __name__ == "__main__":
    main("forum", __doc__, compute, draw)
