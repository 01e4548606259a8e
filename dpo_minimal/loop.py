"""The one plain training loop: pretraining, SFT and DPO differ only in the batches and the loss.

AdamW, linear warmup and cosine decay, gradient accumulation, clipping, evaluation, a log, and
states that an interrupted run goes on from, bit for bit. Read `train` from top to bottom.
"""

import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_minimal import parallel
from dpo_minimal.checkpoint import load_state, save_state
from dpo_minimal.files import whole_file


@dataclass(frozen=True)
class Settings:
    """How one stage trains. A step is grad_accum forward passes of batch_size rows or pairs."""

    learning_rate: float
    batch_size: int
    grad_accum: int = 1
    epochs: float = 1.0
    max_steps: int | None = None  # None: as many as `epochs` take
    warmup_steps: int | None = None  # None: a tenth of all steps
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    eval_every: int = 0  # 0: not during training
    eval_at_start: bool = True  # of DPO it is known: policy = reference, all rewards are 0
    save_every: int = 0
    seed: int = 0


def steps_per_epoch(settings: Settings, num_batches: int) -> float:
    """Optimizer steps that see every batch of an epoch once."""
    return num_batches / settings.grad_accum


def count_steps(settings: Settings, num_batches: int) -> int:
    """Optimizer steps of a stage."""
    steps = math.ceil(settings.epochs * steps_per_epoch(settings, num_batches))
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """The rate of step 0, 1, ...: a linear rise over the warmup, then half a cosine down to 0."""
    warmup = settings.warmup_steps if settings.warmup_steps is not None else steps // 10
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model, objective, order, collate, steps, settings, log, state_path, evaluate=None, keep=None
):
    """Train the model's trainable parameters for `steps` steps.

    objective(model, batch) -> (losses [n], metrics {name: [n]}), n = batch.count: one value a pair
    or scored token. order: endless lists of rows, as `Batches` yields them; collate(rows) makes a
    Batch. evaluate(model) -> metrics. log: a Log. state_path: where the state is kept; training
    goes on from it if it is there. keep(): called before a state is saved, for what goes with it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay, fused=True)
    first_step, num_tokens = 0, 0
    if state_path.exists():
        progress = load_state(state_path, model, optimizer)
        first_step, num_tokens = progress["step"], progress["num_tokens"]
        order.place = progress["place"]
    log.rewind(first_step)
    draw = iter(order)
    model.train()
    for step in range(first_step, steps):
        due = settings.eval_every and step % settings.eval_every == 0
        if evaluate and due and (step or settings.eval_at_start):
            log.write(step, prefix="eval_", **evaluate(model))
        started = time.perf_counter()
        rate = learning_rate(step, steps, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate

        shares = [parallel.share(next(draw)) for _ in range(settings.grad_accum)]
        batches = [collate(rows) for rows in shares if rows]
        # Of all batches and processes together, so that 4 batches of 1 are 1 batch of 4.
        count = parallel.total(sum(batch.count for batch in batches))
        sums = Counter()
        for batch in batches:
            losses, metrics = objective(model, batch)
            (losses.sum() / count).backward()
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] += values.detach().sum()
        parallel.add_gradients(parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        tokens = parallel.total(sum(batch.num_tokens for batch in batches))
        num_tokens += tokens
        sums = parallel.total({name: float(value) for name, value in sums.items()})
        means = {name: value / count for name, value in sums.items()}
        seconds = time.perf_counter() - started
        log.write(
            step,
            **means,
            grad_norm=float(grad_norm),
            learning_rate=rate,
            num_tokens=num_tokens,
            tokens_per_second=round(tokens / seconds, 1),
        )
        if settings.save_every and (step + 1) % settings.save_every == 0 and parallel.first():
            if keep:
                keep()
            progress = dict(step=step + 1, num_tokens=num_tokens, place=order.place)
            save_state(state_path, model, optimizer, **progress)
    if evaluate:
        log.write(steps, prefix="eval_", **evaluate(model))


def peak_memory_gb() -> float:
    """The most memory held so far: the GPU's where one is used, else the process's."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return 0.0  # not to be had from Python alone
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Log:
    """A stage's lines in metrics.jsonl, and its progress on the screen every two seconds."""

    def __init__(self, path, stage: str, steps: int, steps_per_epoch: float = math.inf):
        self.path, self.stage, self.steps = Path(path), stage, steps
        self.steps_per_epoch = steps_per_epoch
        self.started = self.shown = None

    def rewind(self, step: int):
        """Forget lines of this stage from `step` on: an interrupted run writes them again."""
        if not parallel.first():
            return
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        rows = ((json.loads(line), line) for line in lines if line.endswith("}"))
        kept = [line for row, line in rows if row["stage"] != self.stage or row["step"] < step]
        with whole_file(self.path) as file:
            file.write("".join(f"{line}\n" for line in kept).encode())
        self.started, self.first_step = time.perf_counter(), step

    def write(self, step: int, prefix: str = "", **metrics):
        """Append a line; `prefix` marks the metrics of an evaluation."""
        if not parallel.first():
            return
        row = {"stage": self.stage, "step": step}
        row |= {prefix + name: value for name, value in metrics.items()}
        row["epoch"] = round((step + (not prefix)) / self.steps_per_epoch, 4)
        row["peak_memory_gb"] = round(peak_memory_gb(), 3)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        now = time.perf_counter()
        last = step == self.steps - 1
        if prefix or last or self.shown is None or now - self.shown > 2:
            self.shown = now
            self.show(step, row, prefix, now)

    def show(self, step: int, row: dict, prefix: str, now: float):
        """One line: stage, step of steps, loss, margin, tokens a second, time left."""
        text = f"{self.stage:9}"
        text += f"step {step:>4} held out " if prefix else f"step {step + 1:>4}/{self.steps} "
        forms = {"loss": ".6f", "rewards/margins": "+.3f", "rewards/accuracies": ".2f"}
        for name, form in forms.items():
            if prefix + name in row:
                text += f" {name.split('/')[-1]} {row[prefix + name]:{form}}"
        if not prefix:
            done = step + 1 - self.first_step
            left = (now - self.started) / done * (self.steps - step - 1)
            text += f"  {row['tokens_per_second']:,.0f} tokens/s  {left:.0f} s left"
        print(text, flush=True)
