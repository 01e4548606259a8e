"""Our side of against_trl.py: the DPO stage of train.py over the bare base, with a clock."""

import time
from functools import partial

import torch
from record import read_log
from same_task import BETA, LORA, make_settings, start_adapter
from step import peak_memory, reset_peak

from dpo_minimal.batches import pair_batch
from dpo_minimal.checkpoint import load_llama
from dpo_minimal.loop import Stage, train
from dpo_minimal.lora import active_adapters, add_adapter
from dpo_minimal.loss import dpo_loss, preference_logps, reward_metrics
from dpo_minimal.nf4 import keep_weights
from dpo_minimal.reference import pair_logps


class TimedOrder:
    """The order of a `Stage`: the given batches, once. Notes the time when each is asked for."""

    def __init__(self, given: list[list[int]]):
        self.given, self.times = given, []

    def num_batches(self, batch_size: int) -> int:
        """How many batches there are."""
        return len(self.given)

    def batches(self, batch_size: int, place):
        """Yield (indices of a batch, place)."""
        for indices in self.given:
            self.times.append(now())
            yield indices, place


def now() -> tuple[float, float]:
    """Wall-clock time and CPU time, in seconds."""
    return time.perf_counter(), time.process_time()


def run_ours(folder, pairs, order, args, scratch) -> dict:
    """Train as the DPO stage of train.py does, on top of the bare base."""
    memory_before = peak_memory(args.device)
    model = load_llama(folder, args.device, getattr(torch, args.dtype), "nf4")
    add_adapter(model, "dpo", **LORA)
    start_adapter(model)
    load_peak = peak_memory(args.device)
    reset_peak(args.device)
    model.gradient_checkpointing = args.gradient_checkpointing
    keep_weights(model, args.gradient_checkpointing)
    if args.side == "ours-compile":
        for block in model.model.layers:
            block.compile()
    with active_adapters(model, []):
        pair_logps(model, pairs, order[:2], args.device)  # compiles, if the side does
        started = time.perf_counter()
        reference = pair_logps(model, pairs, order, args.device)  # on the CPU, so all is done
    reference_seconds = time.perf_counter() - started
    timed = TimedOrder(order)
    collate = partial(pair_batch, pairs, device=args.device)
    stage = Stage("dpo", our_objective(reference), timed, collate)
    train(model, stage, make_settings(args), scratch)
    # A step ends where the next one asks for its first batch, and the last one ends here.
    times = [*timed.times[args.grad_accum :: args.grad_accum], now()]
    losses = [row["loss"] for row in read_log(scratch / "metrics.jsonl")["dpo"][0]]
    return {
        **{"times": times, "losses": losses, "reference_seconds": reference_seconds},
        **{"memory_before_gb": memory_before / 1e9, "load_peak_gb": load_peak / 1e9},
    }


def our_objective(reference):
    """The objective of the DPO stage of train.py."""

    def objective(model, batch):
        policy_chosen_logps, policy_rejected_logps = preference_logps(model, batch)  # [B] each
        ref_chosen_logps, ref_rejected_logps = reference[batch.indices].to(policy_chosen_logps).T
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            beta=BETA,
        )
        return losses, reward_metrics(
            policy_chosen_logps, policy_rejected_logps, chosen_rewards, rejected_rewards
        )

    return objective
