"""The one plain training loop: pretraining, SFT and DPO differ only in the batches and the loss.

AdamW, linear warmup and cosine decay, gradient accumulation, clipping, evaluation, a log, and
states from which a stopped run goes on (on a CPU to the same bits). Read `train` top to bottom.
"""

import io
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dpo_minimal import InputError
from dpo_minimal.batches import Order
from dpo_minimal.extras import early, parallel, progress
from dpo_minimal.extras.reading import reading
from dpo_minimal.files import read_sealed, write_sealed
from dpo_minimal.log import Log


@dataclass(frozen=True)
class Settings:
    """How a stage trains. A step has grad_accum batches of batch_size rows (SFT) or pairs (DPO)."""

    learning_rate: float
    batch_size: int
    grad_accum: int = 1
    epochs: float = 1.0
    max_steps: int | None = None  # None: as many as `epochs` take
    warmup_steps: int | None = None  # None: a tenth of all steps
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    eval_every: int = 0  # 0: not during training
    eval_at_start: bool = True  # False saves the time; the result is known: all rewards are 0
    save_every: int = 0
    stop_when: float | None = None  # see `extras.early`


@dataclass(frozen=True)
class Stage:
    """What a stage trains on, and what it minimizes.

    objective(model, batch) -> (losses [n], metrics {name: [n]}) with one value per pair or scored
    token, n = batch.count. collate(rows) makes a Batch of an order's rows. evaluate(model) ->
    metrics. tables: tensors that the stage fills as it goes, and that are saved with its state.
    """

    name: str
    objective: Callable
    order: Order
    collate: Callable
    evaluate: Callable | None = None
    tables: dict[str, torch.Tensor] = field(default_factory=dict)


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


def train(model, stage: Stage, settings: Settings, folder, resume: bool = False, asked=()):
    """Train the model's trainable parameters; write folder/metrics.jsonl and folder/state/.

    resume: go on from a saved state. asked: once it holds something, the running step is the last.
    """
    folder, num_batches = Path(folder), stage.order.num_batches(settings.batch_size)
    steps, epoch = count_steps(settings, num_batches), steps_per_epoch(settings, num_batches)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay, fused=True)
    state_path = folder / "state" / f"{stage.name}.pt"
    first_step, num_tokens, place = start(state_path, model, optimizer, stage.tables, resume)
    log = Log(folder / "metrics.jsonl", stage.name, first_step, steps, epoch)
    draw = stage.order.batches(settings.batch_size, place)
    model.train()
    for step in range(first_step, steps):
        if stage.evaluate and evaluation_is_due(step, settings):
            found = stage.evaluate(model)
            log.write(step, prefix="eval_", **found)
            if early.stops(found, settings.stop_when):
                break
        started = time.perf_counter()
        rate = learning_rate(step, steps, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches, place = next_batches(draw, settings.grad_accum, stage.collate)
        # Over all batches and processes, so that 4 batches of 1 give the gradient of 1 batch of 4.
        count = parallel.total(sum(batch.count for batch in batches))
        sums = Counter()
        for done, batch in enumerate(batches):
            progress.show(f"{stage.name} step {step + 1}", done, len(batches), "batches")
            losses, metrics = stage.objective(model, batch)
            (losses.sum() / count).backward()
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] += values.detach().sum()
        parallel.add_gradients(parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        metrics = means(sums, count) | {"grad_norm": float(grad_norm), "learning_rate": rate}
        stop_unless_finite(stage.name, step, metrics, batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        tokens = parallel.total(sum(batch.num_tokens for batch in batches))
        num_tokens += tokens
        speed = round(tokens / (time.perf_counter() - started), 1)
        log.write(step, **metrics, num_tokens=num_tokens, tokens_per_second=speed)
        reached = (step + 1, num_tokens, place)
        if parallel.total(len(asked)):
            save_and_stop(state_path, model, optimizer, stage, reached)
        if settings.save_every and (step + 1) % settings.save_every == 0 and parallel.first():
            save_state(state_path, model, optimizer, stage.tables, reached)
    else:
        step = steps
        if stage.evaluate:
            log.write(step, prefix="eval_", **stage.evaluate(model))
    if parallel.total(len(asked)):  # during that evaluation
        save_and_stop(state_path, model, optimizer, stage, (step, num_tokens, place))


def evaluation_is_due(step: int, settings: Settings) -> bool:
    """Whether to evaluate before this step; an evaluation after the last step always happens."""
    due = settings.eval_every and step % settings.eval_every == 0
    return bool(due) and (step > 0 or settings.eval_at_start)


def next_batches(draw, grad_accum: int, collate):
    """(this process's part of the next grad_accum batches, the place in the order after them)."""
    batches = []
    for _ in range(grad_accum):
        rows, place = next(draw)
        share = parallel.share(rows)
        if share:  # a small last batch may leave nothing for this process
            batches.append(collate(share))
    return batches, place


def means(sums: dict, count: int) -> dict[str, float]:
    """The means of metrics over all processes, from the sums of this one and the count of all."""
    totals = parallel.total({name: float(value) for name, value in sums.items()})
    return {name: value / count for name, value in totals.items()}


def stop_unless_finite(stage: str, step: int, metrics: dict, batches):
    """InputError if the loss or the gradient's norm is not finite, before a step uses them."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            pairs = [i for batch in batches for i in batch.indices or ()]
            where = f"step {step + 1}" + (f", pairs {pairs}" if pairs else "")
            causes = "too large a --learning-rate or --beta, or damaged weights"
            raise InputError(f"{stage}: {name} is {metrics[name]} in {where}; usually {causes}")


def start(state_path: Path, model, optimizer, tables, resume: bool):
    """Where to begin: (step, tokens seen, place in the order), from the state or from nothing."""
    if not resume and parallel.first():
        state_path.unlink(missing_ok=True)  # of an earlier run, which may have had other settings
    parallel.wait()
    if not state_path.exists():
        return 0, 0, (0, 0)
    return load_state(state_path, model, optimizer, tables)


def save_state(path: Path, model, optimizer, tables, reached):
    """Write all that an interrupted stage needs: weights, Adam, random state, tables, place."""
    state = {
        "trained": {name: p.data for name, p in model.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "tables": tables,
        "reached": reached,
    }
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    torch.save(state, data)  # into memory first: torch words a full disk as an error of its own
    write_sealed(path, data.getvalue())


def save_and_stop(path: Path, model, optimizer, stage: Stage, reached):
    """Save the state of a stage that was asked to stop, then raise KeyboardInterrupt."""
    if parallel.first():
        save_state(path, model, optimizer, stage.tables, reached)
    raise KeyboardInterrupt(f"{stage.name}: stopped at step {reached[0]}; --resume goes on")


def load_state(path: Path, model, optimizer, tables):
    """Put a saved state back into the model, optimizer, tables and torch; returns what was reached.

    InputError if it is damaged, or if its tables have other sizes: then the data are others.
    """
    with reading(path, "a state of this run"):
        state = torch.load(io.BytesIO(read_sealed(path)), map_location="cpu", weights_only=True)
        for name, table in tables.items():
            saved = state["tables"][name]
            if saved.shape != table.shape:
                found = f"{len(table)} {name} pairs, and the interrupted run had {len(saved)}"
                raise InputError(f"{path}: {found}: resume with the same data")
            table.copy_(saved)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(state["trained"][name])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
        return state["reached"]
