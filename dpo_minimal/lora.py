"""LoRA: low-rank adapters beside frozen linear layers. Add, switch on and off, merge.

From Hu et al. 2021 (arXiv:2106.09685, eq. 3): y = W x + (alpha / r) B A x. Adapters stack: DPO
trains a second one on top of SFT's, and its reference is the model with the second switched off.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from dpo_minimal import InputError
from dpo_minimal.nf4 import NF4Linear, dequantize_nf4


class Adapter(nn.Module):
    """One low-rank update, scale * B A, with A [r, in] and B [out, r], float32.

    A is uniform in +-1/sqrt(in) and B is zero: a new adapter changes nothing, yet B's gradient is
    not zero. Both stay float32 whatever the layer computes in, because AdamW's small steps would
    round away in 16 bits.
    """

    def __init__(self, in_features: int, out_features: int, r: int, alpha: float, dropout: float):
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.lora_A = nn.Parameter(torch.empty(r, in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        self.scale, self.dropout = alpha / r, dropout

    def forward(self, x):  # [..., in] -> [..., out]
        # Not on a frozen adapter: it is part of the reference, which must not be noisy.
        if self.training and self.lora_A.requires_grad:
            x = F.dropout(x, self.dropout)
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return F.linear(F.linear(x, A), B) * self.scale

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) is for the base; an adapter only changes its device or becomes float64.
        def move_or_widen(t):
            moved = fn(t)
            return moved if moved.dtype.itemsize >= 4 else t.to(moved.device)

        return super()._apply(move_or_widen, recurse)

    def delta(self) -> torch.Tensor:
        """The update as a full matrix, [out, in] float32."""
        return self.scale * (self.lora_B @ self.lora_A)


class LoRALinear(nn.Module):
    """A frozen linear layer, plain or NF4, and its adapters; `active` names those in use."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    def forward(self, x):  # [..., in] -> [..., out]
        y = self.base(x)
        for name in self.active:
            y = y + self.adapters[name](x)
        return y


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adaptable linear layers by full name, in order; with adapters they are LoRALinears.

    The head is not adapted, because in some models it is shared with the embedding.
    """
    kinds, layers = (nn.Linear, NF4Linear, LoRALinear), {}
    for name, module in model.named_modules():
        is_head = name.split(".")[-1] == "lm_head"
        is_base = name.removesuffix(".base") in layers  # inside a LoRALinear, which comes first
        if isinstance(module, kinds) and not is_head and not is_base:
            layers[name] = module
    return layers


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers by full name, in order."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, LoRALinear)}


def add_adapter(model: nn.Module, name: str, r=8, alpha=16.0, dropout=0.0, targets="q_proj,v_proj"):
    """Add a trainable adapter to the layers that `targets` names, in place; freeze everything else.

    targets: last names of linear layers, separated by commas, or full names, or "all" for every
    linear layer but the head. All adapters of a changed layer become active; one of the same name
    is replaced. InputError if a target is not in the model.
    """
    layers = linear_layers(model)
    last_names = {full: full.split(".")[-1] for full in layers}
    wanted = set(last_names.values()) if targets == "all" else set(targets.split(","))
    unknown = wanted - set(last_names.values()) - set(layers)
    if unknown:
        have = ", ".join(dict.fromkeys(last_names.values()))
        missing = ", ".join(sorted(unknown))
        raise InputError(f"no linear layer is called {missing}: this model has {have} (or: all)")
    model.requires_grad_(False)
    for full, layer in layers.items():
        if last_names[full] not in wanted and full not in wanted:
            continue
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer)
            model.set_submodule(full, layer)
        base = layer.base
        adapter = Adapter(base.in_features, base.out_features, r, alpha, dropout)
        layer.adapters[name] = adapter.to(next(iter(base.state_dict().values())).device)
        layer.active = tuple(layer.adapters)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's adapters, in the order in which they were added."""
    layers = lora_layers(model).values()
    return list(dict.fromkeys(name for layer in layers for name in layer.adapters))


@contextmanager
def active_adapters(model: nn.Module, names):
    """Within the context only the named adapters act, where a layer has them: [] is the base.

    `with active_adapters(model, ["sft"])` turns the policy base + sft + dpo into its reference. If
    there is a backward pass, run it inside too, because gradient checkpointing computes the layers
    again there. ValueError for a name that no layer has, which would silently switch all off.
    """
    layers = lora_layers(model).values()
    if isinstance(names, str) or set(names) - set(adapter_names(model)):
        raise ValueError(f"active_adapters: {names!r} is not a list of names that adapters have")
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = tuple(name for name in layer.adapters if name in names)
    try:
        yield model
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def merged_weight(layer: nn.Module) -> torch.Tensor:
    """A layer's weight with its active adapters added, [out, in] float32, detached.

    It adds to dequantize(W), which the adapters were trained over, and not to the original W.
    """
    base = layer.base if isinstance(layer, LoRALinear) else layer
    weight = dequantize_nf4(base.quantized) if isinstance(base, NF4Linear) else base.weight
    weight = weight.detach().to(torch.float32)
    for name in getattr(layer, "active", ()):
        weight = weight + layer.adapters[name].delta().detach()
    return weight
