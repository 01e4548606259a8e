"""Adapter folders in PEFT's layout: adapter_config.json and adapter_model.safetensors."""

from pathlib import Path

import torch
import torch.nn.functional as F

from dpo_minimal import InputError
from dpo_minimal.extras.reading import read_json
from dpo_minimal.files import whole_folder, write_json
from dpo_minimal.formats.bounds import ADAPTER_BOUNDS, check_bounds
from dpo_minimal.formats.safetensors import open_safetensors, write_safetensors
from dpo_minimal.llama import Llama
from dpo_minimal.lora import add_adapter, linear_layers, lora_layers

# What an adapter_config.json may ask for in one form only; other settings change nothing here.
PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "trainable_token_indices": None,
    "init_lora_weights": True,
}
# Ways to begin the training that leave the base weights as they are, and settings without effect.
BEGINNINGS = (True, "gaussian", "eva", "orthogonal")
NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "r",
    "revision", "target_modules", "task_type",
}  # fmt: skip


def save_adapter(model: Llama, names: list[str], folder, base_name: str = "", add=None):
    """Write the named adapters as one in PEFT's layout. add(folder): puts more files there.

    Adapters of ranks r1 and r2 are one of rank r1 + r2, with the A's stacked and the scaled B's
    side by side: B1 A1 + B2 A2 = [B1 B2] [A1; A2]. Scales are multiplied into B, so alpha = r.
    """
    chosen = {}  # full name of a layer: its adapters of these names
    for path, layer in lora_layers(model).items():
        adapters = [adapter for name, adapter in layer.adapters.items() if name in names]
        if adapters:
            chosen[path] = adapters
    r = max(sum(len(adapter.lora_A) for adapter in adapters) for adapters in chosen.values())
    tensors = {}
    for path, adapters in chosen.items():
        A = torch.cat([adapter.lora_A for adapter in adapters])  # [sum r, in]
        scaled_Bs = [adapter.scale * adapter.lora_B for adapter in adapters]
        B = torch.cat(scaled_Bs, dim=1)  # [out, sum r]
        missing = r - len(A)  # if a layer has fewer adapters than another, zeros fill up
        tensors[f"base_model.model.{path}.lora_A.weight"] = F.pad(A, (0, 0, 0, missing))
        tensors[f"base_model.model.{path}.lora_B.weight"] = F.pad(B, (0, missing))
    config = PLAIN_LORA | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "target_modules": target_names(model, chosen),
        "inference_mode": True,
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{folder} is not written: {name} holds NaN or infinite numbers")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with whole_folder(folder) as folder:
        write_json(folder / "adapter_config.json", config)
        path = folder / "adapter_model.safetensors"
        write_safetensors(path, shapes, torch.float32, tensors.__getitem__)
        if add:
            add(folder)


def target_names(model: Llama, chosen) -> list[str]:
    """The last names of the chosen layers, or their full names if other layers share those."""
    names = {path.split(".")[-1] for path in chosen}
    everywhere = all(path in chosen for path in named_layers(model, names))
    return sorted(names if everywhere else chosen)


def named_layers(model: Llama, targets) -> list[str]:
    """The full names of the layers that target_modules names by last or by full names."""
    paths = linear_layers(model)
    return [p for p in paths if any(p == name or p.endswith(f".{name}") for name in targets)]


def load_adapter(model: Llama, folder, name: str):
    """Add the adapter of a folder in PEFT's layout under a name, as the model's trainable one.

    InputError if it is not plain LoRA, or does not fit this model.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    check_plain(folder, config)
    weights = open_safetensors(folder / "adapter_model.safetensors")
    paths = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]: None for key in weights}
    check_paths(folder, config, model, paths)
    add_adapter(model, name, r=config["r"], alpha=config["lora_alpha"], targets=",".join(paths))
    layers = lora_layers(model)
    for path in paths:
        for part in ("lora_A", "lora_B"):
            parameter = getattr(layers[path].adapters[name], part)
            saved = weights.pop(f"base_model.model.{path}.{part}.weight", None)
            if saved is None or saved.shape != tuple(parameter.shape):
                found = "missing" if saved is None else f"of shape {list(saved.shape)}"
                wanted = list(parameter.shape)
                raise InputError(f"{folder}: {path}.{part} is {found}, this model needs {wanted}")
            if not saved.dtype.is_floating_point:
                raise InputError(f"{folder}: {path}.{part} is of {saved.dtype}: no weights")
            parameter.data.copy_(saved.read())
            if not parameter.isfinite().all():
                raise InputError(f"{folder}: {path}.{part} holds NaN or infinite numbers")
    if weights:
        raise InputError(f"{folder}: {next(iter(weights))} is not part of a LoRA adapter")


def check_plain(folder: Path, config: dict):
    """InputError unless an adapter_config.json asks for plain LoRA, in numbers that make sense."""
    for key, value in config.items():
        right = value == PLAIN_LORA[key] if key in PLAIN_LORA else key in NO_EFFECT
        if key == "init_lora_weights":
            right = value in BEGINNINGS
        if value and not right:
            raise InputError(f"{folder}: the adapter has {key} = {value!r}: not supported here")
    check_bounds({"r": None, "lora_alpha": None} | config, ADAPTER_BOUNDS, f"{folder}: the adapter")


def check_paths(folder: Path, config: dict, model: Llama, paths):
    """InputError unless the adapted layers are the model's, and all that target_modules names.

    Names that no layer has are allowed, as in PEFT. A pattern in place of a list of names is not
    followed, and layers may be left out where the config says so: then the weights tell which.
    """
    layers = linear_layers(model)
    for path in paths:
        if path not in layers:
            raise InputError(f"{folder}: {path} is no linear layer of this model")
    targets = config.get("target_modules") or "all-linear"
    if isinstance(targets, str) and targets != "all-linear":
        return
    if not isinstance(targets, str | list) or not all(isinstance(name, str) for name in targets):
        raise InputError(f"{folder}: target_modules is {targets!r}, and not a list of names")
    wanted = list(layers) if targets == "all-linear" else named_layers(model, targets)
    for path in paths:
        if path not in wanted:
            raise InputError(
                f"{folder}: has weights for {path}, which target_modules does not name"
            )
    left_out = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    for path in () if left_out else wanted:
        if path not in paths:
            raise InputError(f"{folder}: target_modules names {path}, whose weights are missing")
