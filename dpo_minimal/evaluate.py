"""What tuning changed: loss and rewards on held-out pairs, and the KL to the reference."""

import itertools
from functools import partial
from statistics import mean

import torch

from dpo_minimal.batches import answer_rows, pair_order
from dpo_minimal.extras import progress
from dpo_minimal.extras.losses import LossSettings, pair_lengths, preference_loss
from dpo_minimal.lora import active_adapters
from dpo_minimal.loss import reward_metrics, sequence_logps
from dpo_minimal.reference import known_reference_logps, pair_logps


def one_epoch(pairs, batch_size: int, seed: int = 0) -> list[list[int]]:
    """The batches of the first epoch, as lists of indices."""
    order = pair_order(pairs, batch_size, seed)
    batches = itertools.islice(order.batches(batch_size), order.num_batches(batch_size))
    return [indices for indices, _ in batches]


def evaluate_pairs(
    model, pairs, batches, ref_table, *, settings: LossSettings, device
) -> dict[str, float]:
    """Mean loss and reward metrics of pairs under the model's active adapters.

    batches: a list of indices for each forward pass; together they cover all pairs. ref_table: as
    for `known_reference_logps`.
    """
    policy = pair_logps(model, pairs, batches, device)
    ref_logps = partial(known_reference_logps, table=ref_table)
    ref = pair_logps(model, pairs, batches, device, of_batch=ref_logps)
    return preference_metrics(policy, ref, pair_lengths(pairs), settings=settings)


def preference_metrics(policy, ref, lengths, settings: LossSettings) -> dict[str, float]:
    """Mean loss and reward metrics; log-probabilities and lengths are [n, 2], chosen, rejected."""
    policy_chosen_logps, policy_rejected_logps = policy.T
    ref_chosen_logps, ref_rejected_logps = ref.T
    losses, chosen_rewards, rejected_rewards = preference_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        lengths=lengths,
        settings=settings,
    )
    metrics = reward_metrics(
        policy_chosen_logps, policy_rejected_logps, chosen_rewards, rejected_rewards
    )
    return {name: float(values.mean()) for name, values in {"loss": losses, **metrics}.items()}


@torch.no_grad()
def kl_estimate(model, reference, prompts, answers, device, batch_size=16, known=None) -> float:
    """KL(policy || reference) in nats per answer: the mean of log pi - log ref over pi's samples.

    The policy has the model's active adapters, the reference those in `reference`. Token ids of
    prompts, and of the policy's answers at temperature 1. known: their log pi, float32 [n] or None.
    """
    training, ratios = model.training, []
    model.eval()  # dropout would count as a difference
    for at in range(0, len(prompts), batch_size):
        progress.show("KL of samples", at, len(prompts), "answers")
        span = slice(at, at + batch_size)
        examples = list(zip(prompts[span], answers[span], strict=True))
        tokens, loss_mask = answer_rows(examples, device)
        log_pi = sequence_logps(model, tokens, loss_mask) if known is None else known[span]
        with active_adapters(model, reference):
            log_ref = sequence_logps(model, tokens, loss_mask)
        ratios += (log_pi - log_ref).tolist()
    model.train(training)
    return mean(ratios)


if __name__ == "__main__":
    from dpo_minimal.extras import command_line, measure

    command_line.run_command(measure.main)
