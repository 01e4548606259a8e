"""A Llama small enough for a unit test, with weights large enough that every part of it matters."""

import os
from pathlib import Path

import pytest
import torch

from dpo_minimal.batches import joined, pair_batches
from dpo_minimal.data import EncodedPair
from dpo_minimal.llama import Llama, LlamaConfig

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,  # not hidden_size / num_attention_heads, so that mixing them up shows
    "initializer_range": 0.3,
}


def tiny_llama(dtype=torch.float64, seed=0, **changes) -> Llama:
    """A seeded Llama of SHAPE with `changes`; its norm weights are random too."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**SHAPE | changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype)


def batch_order(lengths, batch_size: int, seed: int):
    """The numbers of examples of these lengths, in the batches in which pairs are trained."""
    pairs = [EncodedPair([0] * n, [], []) for n in lengths]
    return (list(joined(rows)) for rows in pair_batches(pairs, batch_size, seed))


def random_tokens(B: int, T: int, seed=1) -> torch.Tensor:
    """Token ids of the tiny vocabulary, int64 [B, T]."""
    return torch.randint(SHAPE["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def fill_adapter(model, name: str, seed=2, size=0.2):
    """Give the named adapter a random B, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if path.endswith(f"{name}.lora_B"):
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


def real_input(name: str) -> Path:
    """The path of a real input; the test is skipped where there is none."""
    beside = Path(__file__).parents[2] / "shared" / "real"
    path = Path(os.environ.get("DPO_MINIMAL_REAL", beside)) / name
    if not path.exists():
        pytest.skip(f"{name} is not here: set DPO_MINIMAL_REAL to the folder that has it")
    return path
