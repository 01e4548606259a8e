"""Our side of against_trl.py: the DPO stage of train.py over the bare base, with a clock."""

import time
from functools import partial

import torch
from same_task import BETA, LORA, make_settings, start_adapter
from step import peak_memory, reset_peak

from dpo_minimal.batches import pair_batch
from dpo_minimal.checkpoint import load_llama
from dpo_minimal.evaluate import pair_logps
from dpo_minimal.loop import Log, train
from dpo_minimal.lora import active_adapters, add_adapter
from dpo_minimal.loss import dpo_loss, preference_logps, reward_metrics


class Clock(Log):
    """The log of the training loop, which also notes the time after each step."""

    def rewind(self, step):
        super().rewind(step)
        self.times, self.losses = [], []

    def write(self, step, prefix="", **metrics):
        super().write(step, prefix, **metrics)
        self.times.append((time.perf_counter(), time.process_time()))
        self.losses.append(metrics["loss"])


def run_ours(folder, pairs, order, args, scratch) -> dict:
    """Train as the DPO stage of train.py does, on top of the bare base."""
    memory_before = peak_memory(args.device)
    model = load_llama(folder, args.device, getattr(torch, args.dtype), "nf4")
    add_adapter(model, "dpo", **LORA)
    start_adapter(model)
    load_peak = peak_memory(args.device)
    reset_peak(args.device)
    if args.side == "ours-compile":
        for block in model.model.layers:
            block.compile()
    with active_adapters(model, []):
        pair_logps(model, pairs, order[:2], args.device)  # compiles, if the side does
        started = time.perf_counter()
        reference = pair_logps(model, pairs, order, args.device)  # on the CPU, so all is done
    reference_seconds = time.perf_counter() - started
    model.gradient_checkpointing = args.gradient_checkpointing
    settings = make_settings(args)
    steps = args.warmup + args.steps
    clock = Clock(scratch / "metrics.jsonl", "dpo", steps)
    collate = partial(pair_batch, pairs, device=args.device)
    state = scratch / "state.pt"
    train(model, our_objective(reference), iter(order), collate, steps, settings, clock, state)
    return {
        **{"times": clock.times, "losses": clock.losses, "reference_seconds": reference_seconds},
        **{"memory_before_gb": memory_before / 1e9, "load_peak_gb": load_peak / 1e9},
    }


def our_objective(reference):
    """The objective of the DPO stage of train.py."""

    def objective(model, batch):
        policy = preference_logps(model, batch)  # chosen [B], rejected [B]
        ref = reference[batch.indices].to(policy[0]).T  # [2, B]
        losses, chosen, rejected = dpo_loss(*policy, *ref, beta=BETA)
        return losses, reward_metrics(*policy, chosen, rejected)

    return objective
