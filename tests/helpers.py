"""A Llama small enough for a unit test, with weights large enough that every part of it matters."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from dpo_minimal.batches import pair_order
from dpo_minimal.data import EncodedPair
from dpo_minimal.llama import Llama, LlamaConfig
from dpo_minimal.lora import LoRALinear, linear_layers, merged_weight
from dpo_minimal.nf4 import NF4Linear, quantize_nf4

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


def quantize_model(model: nn.Module, double_quant: bool = True) -> nn.Module:
    """Replace each linear layer but the head by an NF4Linear, in place."""
    for name, layer in linear_layers(model).items():
        weight = quantize_nf4(layer.weight, double_quant=double_quant)
        model.set_submodule(name, NF4Linear(weight))
    return model


def merge_adapters(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace each adapted layer by a plain one with its active adapters added, in place.

    dtype: of the new weights; the head's if not given.
    """
    dtype = dtype or model.lm_head.weight.dtype
    for name, layer in linear_layers(model).items():
        if isinstance(layer, LoRALinear):
            weight = merged_weight(layer).to(dtype)
            linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            model.set_submodule(name, linear)
    return model


def batch_order(lengths, batch_size: int, seed: int):
    """The indices of pairs of these lengths, for ever, in the batches in which they are trained."""
    pairs = [EncodedPair([0] * n, [], []) for n in lengths]
    order = pair_order(pairs, batch_size, seed)
    return (indices for indices, _ in order.batches(batch_size))


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
