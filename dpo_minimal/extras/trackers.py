"""Trackers: `--track wandb`, `tensorboard` or `trackio` shows metrics.jsonl as it grows.

A tracker gets the lines of metrics.jsonl, after they are written, with their names and numbers.
Every stage counts its steps from 0, so other stages than DPO are part of the names:

    stage dpo             loss, rewards/chosen, eval_loss, ...       over `step`
    stages pretrain, sft  sft/loss, sft/learning_rate, ...           over `sft/step`
    the last table        evaluate/DPO/kl_to_sft, ..., and `samples`, the questions with answers

The settings are those of config.json. Each command begins a run of its own at the tracker, and
sends all of metrics.jsonl first: so after --resume the newest run there is whole. A tracker that
fails ends with a warning, and the training goes on. Process 0 alone has one.
"""

import atexit
import json
import os
import socket
import time
from importlib.util import find_spec
from io import FileIO
from pathlib import Path

from dpo_minimal import InputError
from dpo_minimal.extras.reading import first_line


class WandB:
    """A run at Weights & Biases; WANDB_MODE, WANDB_PROJECT and so on say where. Its files: wandb/.

    W&B has one count of steps per run, so each metric is told which step it goes over.
    """

    def __init__(self, folder: Path, config: dict):
        import wandb

        self.table, self.defined = wandb.Table, set()
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dpo_minimal"),
            name=folder.name,
            dir=str(folder),
            config=config,
            settings=wandb.Settings(console="off"),  # what is printed stays here
        )

    def write(self, metrics: dict[str, float], prefix: str, step: int):
        for name in metrics.keys() - self.defined:
            self.run.define_metric(name, step_metric=f"{prefix}step")
        self.defined |= metrics.keys()
        self.run.log(metrics | {f"{prefix}step": step})

    def write_samples(self, columns: list[str], rows: list[list[str]]):
        self.run.log({"samples": self.table(columns=columns, data=rows)})

    def close(self):
        self.run.finish()


class TensorBoard:
    """An event file in tensorboard/, for `tensorboard --logdir RUN`.

    Written here and not by a thread: what fails is then known at once. Earlier event files of this
    run go, because TensorBoard would show both.
    """

    def __init__(self, folder: Path, config: dict):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import text

        self.event, self.summary, self.text = event_pb2.Event, summary_pb2.Summary, text
        folder = folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.file = FileIO(folder / name, "wb")
        self.writer = RecordWriter(self.file)
        self.add(file_version="brain.Event:2")
        settings = "```\n" + json.dumps(config, indent=2) + "\n```"
        self.add(step=0, summary=text("settings", settings))

    def add(self, **fields):
        event = self.event(wall_time=time.time(), **fields)
        self.writer.write(event.SerializeToString())

    def write(self, metrics: dict[str, float], prefix: str, step: int):
        values = [self.summary.Value(tag=n, simple_value=v) for n, v in metrics.items()]
        self.add(step=step, summary=self.summary(value=values))

    def write_samples(self, columns: list[str], rows: list[list[str]]):
        lines = [columns, ["---"] * len(columns)]
        for row in rows:
            lines.append([text.replace("|", "\\|").replace("\n", " ") for text in row])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        self.add(step=0, summary=self.text("samples", table))

    def close(self):
        self.file.close()


class Trackio:
    """A run of Trackio's, in its own folder (TRACKIO_DIR) or wherever TRACKIO_SPACE_ID says."""

    def __init__(self, folder: Path, config: dict):
        import trackio

        self.table, self.finish = trackio.Table, trackio.finish
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "dpo_minimal"),
            name=folder.name,
            config=config,
            embed=False,
        )

    def write(self, metrics: dict[str, float], prefix: str, step: int):
        self.run.log(metrics, step=step)

    def write_samples(self, columns: list[str], rows: list[list[str]]):
        self.run.log({"samples": self.table(columns=columns, data=rows)}, step=0)

    def close(self):
        self.finish()


# Each begins a run when it is made, and has write, write_samples and close.
TRACKERS = {"wandb": WandB, "tensorboard": TensorBoard, "trackio": Trackio}
active = {}  # "kind", "tracker", "sent" (bytes of metrics.jsonl): this process's, while it has one


def check_installed(kind: str | None):
    """InputError if the tracker's package is missing."""
    spec = find_spec(kind) if kind else None
    # A folder named wandb, which W&B leaves wherever it ran, has a spec but no origin.
    if kind and (spec is None or spec.origin is None):
        raise InputError(f"--track {kind} needs a package: pip install {kind}")


def start(kind: str | None, folder: Path, config: dict):
    """Begin a run at the tracker, if --track asked for one; process 0 only.

    InputError if it does not begin, such as without a login.
    """
    close()
    if kind is None:
        return
    try:
        tracker = TRACKERS[kind](folder.resolve(), config)
    except Exception as error:  # each package has errors of its own
        later = "put it right and go on with --resume, or without --track"
        raise InputError(f"--track {kind}: {first_line(error).rstrip('.')}; {later}") from None
    active.update(kind=kind, tracker=tracker, sent=0)


def follow(path: Path):
    """Send the lines of metrics.jsonl that are not sent yet."""
    if active:
        attempt(send_lines, path)


def finish(questions: list[str], greedy: dict[str, list[str]], table: dict[str, dict]):
    """Send what an evaluation found: its table, and the questions with each model's answers."""
    if active:
        attempt(send_results, questions, greedy, table)


def close():
    """End the tracker's run."""
    if active:
        attempt(active["tracker"].close)
        active.clear()


atexit.register(close)  # also after Ctrl-C


def attempt(action, *arguments):
    """Call a tracker; if it fails, in whatever way, warn and do without it from then on."""
    try:
        action(*arguments)
    except Exception as error:
        kind = active["kind"]
        active.clear()
        text = f"warning   --track {kind} failed, and the run goes on without it"
        print(f"{text} ({first_line(error)})", flush=True)


def send_lines(path: Path):
    """Send each line behind the part of the file that was sent."""
    with open(path, "rb") as file:
        file.seek(active["sent"])
        lines = file.readlines()
    for line in lines:
        send_row(json.loads(line))
        active["sent"] += len(line)


def send_row(row: dict):
    """Send a row of metrics under its names at the tracker."""
    prefix = "" if row["stage"] == "dpo" else f"{row['stage']}/"
    metrics = {f"{prefix}{n}": value for n, value in row.items() if n not in ("stage", "step")}
    active["tracker"].write(metrics, prefix, row["step"])


def send_results(questions, greedy, table):
    """Send the table as metrics of a stage `evaluate`, then the samples."""
    row = {f"{model}/{name}": value for model, of in table.items() for name, value in of.items()}
    send_row({"stage": "evaluate", "step": 0} | row)
    rows = [list(texts) for texts in zip(questions, *greedy.values(), strict=False)]
    active["tracker"].write_samples(["question", *greedy], rows)
