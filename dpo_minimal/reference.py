"""The reference's log-probabilities: computed when a batch is first seen, and kept in a table.

The reference, base + sft, never changes. So a later epoch reads back what an earlier one computed,
and a resumed run does too, because the table is saved in its state. Of several processes, each has
a table of its own.
"""

import torch

from dpo_minimal.batches import pair_batch
from dpo_minimal.extras import progress
from dpo_minimal.lora import active_adapters, adapter_names
from dpo_minimal.loss import preference_logps


@torch.no_grad()
def batch_logps(model, batch) -> torch.Tensor:
    """log pi of both answers of each pair in a batch, float32 [B, 2], on the CPU.

    Without gradients and dropout; the random state and the model's mode stay as they are.
    """
    training = model.training
    model.eval()
    chosen_logps, rejected_logps = preference_logps(model, batch)
    model.train(training)
    return torch.stack((chosen_logps, rejected_logps), dim=1).float().cpu()


def reference_logps(model, batch) -> torch.Tensor:
    """`batch_logps` under the reference: the same model with the adapter `dpo` switched off."""
    with active_adapters(model, [name for name in adapter_names(model) if name != "dpo"]):
        return batch_logps(model, batch)


def new_table(n: int) -> torch.Tensor:
    """A table for n pairs, float32 [n, 2], chosen and rejected; NaN where nothing is known yet."""
    return torch.full((n, 2), torch.nan)


def known_reference_logps(model, batch, table) -> torch.Tensor:
    """`reference_logps` of a batch, [B, 2], from the table; computed first if any of it is NaN.

    At step 0 policy and reference are computed from the same batch. So they agree exactly, and the
    sigmoid loss is ln 2 to the last bit.
    """
    if table[batch.indices].isnan().any():
        table[batch.indices] = reference_logps(model, batch)
    return table[batch.indices]


def pair_logps(model, pairs, batches, device, of_batch=None) -> torch.Tensor:
    """log pi of both answers of each pair, float32 [n, 2]; NaN for pairs that are in no batch.

    batches: a list of indices for each forward pass. of_batch: what to call if not `batch_logps`.
    """
    logps = new_table(len(pairs))
    for done, indices in enumerate(batches):
        progress.show("log-probabilities of pairs", done, len(batches), "batches")
        logps[indices] = (of_batch or batch_logps)(model, pair_batch(pairs, indices, device))
    return logps
