"""Curves of eight bugs of the zoo (tests/bugs.py), beside those of the healthy run.

    python figures/bugs.py [--draw]

Each bug is planted in a process of its own, which then runs `train.py --stage dpo` for 40 steps.
"""

import shutil
import sys
import time

import world as w
from drawing import BLUE, GREY, ORANGE, main

from benchmarks.record import read_log, run_script
from dpo_minimal.extras.reading import read_json
from dpo_minimal.files import write_json
from tests.bugs import ZOO, apply

STEPS = 40
HEALTHY = 0
# The bug's number: the metric that shows it, and what a reader should see.
SHOWN = {
    1: ("logps/chosen", "good answers look impossible"),
    3: ("logps/rejected", "far too low"),
    12: ("rewards/margins", "a margin before any step"),
    13: ("loss", "ln 2 for ever"),
    14: ("rewards/margins", "hardly any margin"),
    18: ("rewards/margins", "the margin falls"),
    26: ("logps/chosen", "good answers look impossible"),
    30: ("grad_norm", "100 times as large"),
}
LABELS = {
    "logps/chosen": "log π(chosen), nats",
    "logps/rejected": "log π(rejected), nats",
    "rewards/margins": "reward margin",
    "loss": "loss",
    "grad_norm": "gradient norm",
}


def run_with(number: int) -> dict:
    """Run DPO with a bug (0: none) in a folder of its own, and return its curves."""
    folder = w.RUN / "bugs" / str(number)
    if not (folder / "dpo").exists():
        shutil.rmtree(folder, ignore_errors=True)
        for part in ("base", "sft", "data"):
            shutil.copytree(w.RUN / part, folder / part)
        flags = ["--max-steps", STEPS, "--eval-every", 0, "--save-every", 0]
        run_script(__file__, "--plant", number, "--stage", "dpo", "--out", folder, *flags)
    steps, evaluations = read_log(folder / "metrics.jsonl")["dpo"]
    curves = {name: [row[name] for row in steps] for name in LABELS}
    name = ZOO[number - 1].name if number else "healthy"
    accuracy = evaluations[-1]["rewards/accuracies"]
    cpu_seconds = read_json(folder / "cpu_seconds.json")["cpu_seconds"]
    return {"name": name, "held_out_accuracy": accuracy, "cpu_seconds": cpu_seconds} | curves


def plant():
    """In the process of one bug: plant it, then run train.py."""
    number, sys.argv = int(sys.argv[2]), ["train.py", *sys.argv[3:]]
    if number:
        apply(ZOO[number - 1])
    import train

    train.main()
    folder = sys.argv[sys.argv.index("--out") + 1]
    write_json(f"{folder}/cpu_seconds.json", {"cpu_seconds": time.process_time()})


def compute() -> dict:
    """The curves of the healthy run and of the eight bugs."""
    w.open_world()
    symptoms = {number: ZOO[number - 1].symptom for number in SHOWN}
    return {"steps": STEPS, "symptoms": symptoms} | {n: run_with(n) for n in (HEALTHY, *SHOWN)}


def draw(data, plt):
    """A panel per bug: its curve beside that of the healthy run."""
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.4), layout="constrained")
    for axis, (number, (metric, text)) in zip(axes.flat, SHOWN.items(), strict=True):
        run = data[str(number)]
        for curve, colour in ((data[str(HEALTHY)], BLUE), (run, ORANGE)):
            axis.plot(curve[metric], color=colour, linewidth=1.3)
        if metric == "grad_norm":
            axis.set_yscale("log")
        else:
            axis.axhline(0, color=GREY, linewidth=0.6)
        axis.set_title(f"{number} {run['name']}:\n{text}", fontsize=9)
        axis.set(xlabel="step", ylabel=LABELS[metric])
    figure.legend(
        axes[0, 0].lines[:2], ("healthy", "with the bug"), loc="outside lower center", ncols=2
    )
    figure.suptitle("Eight bugs beside the healthy run: each shows in one curve")
    return figure


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plant"]:
        plant()
    else:
        main("bugs", __doc__, compute, draw)
