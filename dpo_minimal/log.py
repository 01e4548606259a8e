"""A run's log: metrics.jsonl, one line per step, and progress on the screen."""

import json
import math
import time
from pathlib import Path

from dpo_minimal.extras import parallel, trackers
from dpo_minimal.extras.machine import peak_memory_gb
from dpo_minimal.extras.progress import duration
from dpo_minimal.files import whole_file


class Log:
    """A stage's lines in metrics.jsonl, and its progress on the screen every two seconds.

    Lines of this stage from `first_step` on are forgotten: an interrupted run writes them again.
    """

    def __init__(self, path, stage: str, first_step: int, steps: int, steps_per_epoch=math.inf):
        self.path, self.stage, self.first_step, self.steps = Path(path), stage, first_step, steps
        self.steps_per_epoch = steps_per_epoch
        self.started, self.shown = time.perf_counter(), None
        if parallel.first():
            rewind(self.path, stage, first_step)

    def write(self, step: int, prefix: str = "", **metrics):
        """Append a line; `prefix` marks the metrics of an evaluation."""
        if not parallel.first():
            return
        row = {"stage": self.stage, "step": step}
        row |= {prefix + name: value for name, value in metrics.items()}
        done = step if prefix else step + 1
        row["epoch"] = round(done / self.steps_per_epoch, 4)
        row["peak_memory_gb"] = round(peak_memory_gb(), 3)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        trackers.follow(self.path)
        now = time.perf_counter()
        if prefix or step == self.steps - 1 or self.shown is None or now - self.shown > 2:
            self.shown = now
            self.show(step, row, prefix, now)

    def show(self, step: int, row: dict, prefix: str, now: float):
        """Print one line: stage, step of steps, loss, rewards, tokens per second, time left."""
        text = f"{self.stage:9}"
        text += f"step {step:>4} held out " if prefix else f"step {step + 1:>4}/{self.steps} "
        forms = {"loss": ".6f", "rewards/chosen": "+.3f"}
        forms |= {"rewards/margins": "+.3f", "rewards/accuracies": ".2f", "kl": ".2f"}
        for name, form in forms.items():
            if prefix + name in row:
                text += f" {name.split('/')[-1]} {row[prefix + name]:{form}}"
        if not prefix:
            done = step + 1 - self.first_step
            left = (now - self.started) / done * (self.steps - step - 1)
            text += f"  {row['tokens_per_second']:,.0f} tokens/s  {duration(left)} left"
        print(text, flush=True)


def rewind(path: Path, stage: str, step: int):
    """Drop a stage's lines from `step` on from a metrics.jsonl, and a line that was cut off."""
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    kept = ""
    for line in lines:
        try:
            row = json.loads(line)
            keep = row["stage"] != stage or row["step"] < step
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if keep:
            kept += f"{line}\n"
    with whole_file(path) as file:
        file.write(kept.encode())
