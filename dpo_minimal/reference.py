"""The reference's log-probabilities: computed when a batch is first seen, and kept.

The reference never changes, so a second epoch, and a run that was interrupted, read what is there.
"""

import hashlib

import torch

from dpo_minimal.evaluate import batch_logps
from dpo_minimal.files import whole_file
from dpo_minimal.lora import active_adapters
from dpo_minimal.parallel import processes


def reference_logps(model, batch) -> torch.Tensor:
    """log-probabilities of a batch of pairs under base + sft, float32 [B, 2]: chosen, rejected."""
    with active_adapters(model, ["sft"]):
        return batch_logps(model, batch)


class Reference:
    """A table of n pairs, float32 [n, 2], NaN where nothing is known yet; kept in a file."""

    def __init__(self, path, n: int):
        self.path = path
        new = torch.full((n, 2), torch.nan)
        self.table = torch.load(path, weights_only=True) if path.exists() else new

    def logps(self, model, batch) -> torch.Tensor:
        """`reference_logps` of a batch, [B, 2].

        In the very batch that the policy is computed in first: so step 0 compares equal
        computations, and its loss is ln 2 exactly.
        """
        if self.table[batch.indices].isnan().any():
            self.table[batch.indices] = reference_logps(model, batch)
        return self.table[batch.indices]

    def save(self):
        """Write the table."""
        with whole_file(self.path) as file:
            torch.save(self.table, file)


def open_reference(run, model, texts, n: int, batch_size: int) -> Reference:
    """The table of these texts' n pairs, in state/: what an earlier command left, or a new one.

    The file's name is a hash of all that the values depend on: weights, texts, tokenizer, batches,
    dtype, device.
    """
    batches = (n, run.args.max_length, batch_size, run.args.seed, processes())
    settings = repr((batches, run.dtype, run.device))
    digest = hashlib.sha256(settings.encode() + texts.digest())
    for path in sorted(run.model_folder.glob("tokenizer*")):
        digest.update(path.read_bytes())
    for name, tensor in model.state_dict().items():
        if ".adapters.dpo." not in name:
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return Reference(run.out / "state" / f"reference-{digest.hexdigest()[:16]}.pt", n)
