"""Adapter folders in PEFT's layout: adapter_config.json and adapter_model.safetensors."""

from pathlib import Path

import torch
import torch.nn.functional as F

from dpo_minimal import InputError
from dpo_minimal.files import read_json, whole_folder, write_json
from dpo_minimal.formats.safetensors import open_safetensors, write_safetensors
from dpo_minimal.llama import Llama
from dpo_minimal.lora import add_adapter, lora_layers

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
}


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
        "target_modules": sorted({path.split(".")[-1] for path in chosen}),
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


def load_adapter(model: Llama, folder, name: str):
    """Add the adapter of a folder in PEFT's layout under a name, as the model's trainable one.

    InputError if it is not plain LoRA, or does not fit this model.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    for key, plain in PLAIN_LORA.items():
        if (config.get(key) or plain) != plain:
            raise InputError(
                f"{folder}: the adapter has {key} = {config[key]!r}: not supported here"
            )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)):
            raise InputError(f"{folder}: adapter_config.json has no number {key}")
    weights = open_safetensors(folder / "adapter_model.safetensors")
    paths = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]: None for key in weights}
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
            tensor = saved.read()
            if not tensor.isfinite().all():
                raise InputError(f"{folder}: {path}.{part} holds NaN or infinite numbers")
            parameter.data.copy_(tensor)
    if weights:
        raise InputError(f"{folder}: {next(iter(weights))} is not part of a LoRA adapter")
