"""Model folders (Hugging Face, Meta), adapter folders (PEFT), and the state of a training run.

Weights are read as safetensors or with `weights_only=True`: nothing in a folder is executed.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dpo_minimal import InputError
from dpo_minimal.extras.meta import open_meta_folder
from dpo_minimal.files import (
    open_safetensors,
    read_json,
    whole_file,
    whole_folder,
    write_json,
    write_safetensors,
)
from dpo_minimal.llama import Llama, LlamaConfig
from dpo_minimal.lora import add_adapter, linear_layers, lora_layers, merged_weight
from dpo_minimal.nf4 import NF4Linear, quantize_nf4

SHARD_BYTES = 5 * 10**9


class ReadTensor:
    """A tensor that is in memory already, with the interface of LazyTensor."""

    def __init__(self, tensor):
        self.tensor, self.shape = tensor, tuple(tensor.shape)

    def read(self) -> torch.Tensor:
        """The tensor itself."""
        return self.tensor


def open_weights(folder: Path) -> dict:
    """The tensors of a Hugging Face folder by name, whichever of the four usual files it has."""
    for single, reader in (
        ("model.safetensors", open_safetensors),
        ("pytorch_model.bin", open_bin),
    ):
        if (folder / f"{single}.index.json").exists():
            weight_map = read_json(folder / f"{single}.index.json").get("weight_map", {})
            files = sorted(set(weight_map.values()))
            return {k: v for file in files for k, v in reader(folder / Path(file).name).items()}
        if (folder / single).exists():
            return reader(folder / single)
    raise InputError(f"{folder}: no model.safetensors, no pytorch_model.bin and no index of shards")


def open_bin(path) -> dict[str, ReadTensor]:
    """The tensors of a PyTorch file, mapped into memory."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling fails in many ways
        raise InputError(
            f"{path}: not a PyTorch weights file ({str(error).splitlines()[0]})"
        ) from None
    return {name: ReadTensor(tensor) for name, tensor in tensors.items()}


def is_meta_folder(folder: Path) -> bool:
    """Whether a folder is in Meta's layout and not also in the Hugging Face one."""
    return (folder / "params.json").exists() and not (folder / "config.json").exists()


def read_config(folder) -> LlamaConfig:
    """A model folder's config; InputError if there is none or it asks for what is not here."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    if is_meta_folder(folder):
        return open_meta_folder(folder)[0]
    config_json = read_json(folder / "config.json")
    try:
        return LlamaConfig.from_dict(config_json)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def load_llama(folder, device="cpu", dtype=torch.float32, quantize: str | None = "nf4") -> Llama:
    """A Llama from a folder in the Hugging Face (or Meta) layout.

    quantize "nf4" turns each linear layer but the head into NF4 as it is read, so that the model
    never exists in 16 bits in memory; None keeps all weights in `dtype`. Frozen where quantized,
    trainable elsewhere. InputError names what is unreadable, unsupported, missing, extra or
    misshapen.
    """
    folder, config = Path(folder), read_config(folder)
    weights = open_meta_folder(folder)[1] if is_meta_folder(folder) else open_weights(folder)
    with torch.device("meta"):
        model = Llama(config)
    check_tensors(folder, model, weights)
    for path, module in list(model.named_modules()):
        for name, _ in list(module.named_parameters(recurse=False)):
            if path == "lm_head" and config.tie_word_embeddings:
                continue
            weight = weights.pop(f"{path}.{name}").read().to(device)
            if quantize and isinstance(module, nn.Linear) and path != "lm_head":
                # From the file's own dtype; through `dtype` first, nibbles would change.
                quantized = replace(quantize_nf4(weight), dtype=dtype)
                model.set_submodule(path, NF4Linear(quantized))
            else:
                setattr(module, name, nn.Parameter(weight.to(dtype)))
    model.tie()
    return model


def check_tensors(folder, model: Llama, weights: dict):
    """InputError unless the folder has exactly the model's tensors, in their shapes."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    # Buffers that old checkpoints carry; a tied head's own copy says nothing new.
    extras = tied | {name for name in weights if name.endswith("rotary_emb.inv_freq")}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in shapes.keys() - weights.keys() - tied:
        raise InputError(f"{folder}: the tensor {name} is missing from the weights")
    for name in weights.keys() - shapes.keys() - extras:
        raise InputError(f"{folder}: the tensor {name} is not part of this Llama")
    for name in shapes.keys() & weights.keys():
        if weights[name].shape != shapes[name]:
            raise InputError(
                f"{folder}: {name} has shape {list(weights[name].shape)}, config.json asks for "
                f"{list(shapes[name])}"
            )


def config_json(config: LlamaConfig, dtype: torch.dtype, source=None) -> dict:
    """A `config.json` that transformers reads, with the special ids of the folder `source`."""
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    if source and (Path(source) / "config.json").exists():
        given = read_json(Path(source) / "config.json")
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        fixed |= {name: given[name] for name in names if name in given}
    return fixed | asdict(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}


def save_llama(model: Llama, folder, dtype: torch.dtype = torch.bfloat16, tokenizer_from=None):
    """Write a plain Hugging Face folder: the dequantized base with the active adapters added.

    The model is left as it is; one layer at a time is merged. tokenizer_from: a folder whose
    tokenizer and generation settings are copied along.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(model.config).named_parameters()}
    layers = {f"{full}.weight": layer for _, _, full, layer in linear_layers(model)}

    def read(name):
        return merged_weight(layers[name]) if name in layers else model.get_parameter(name)

    with whole_folder(folder) as folder:
        write_json(folder / "config.json", config_json(model.config, dtype, tokenizer_from))
        write_shards(folder, shapes, dtype, read)
        if tokenizer_from:
            copy_tokenizer(tokenizer_from, folder)


def write_shards(folder: Path, shapes: dict, dtype: torch.dtype, read):
    """One model.safetensors, or several with an index if they come to more than 5 GB."""
    shards, room = [{}], SHARD_BYTES
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= size
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shapes, dtype, read)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, dtype, read)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def copy_tokenizer(source, folder):
    """Copy what makes a folder usable beside its weights: tokenizer and generation settings."""
    for pattern in ("tokenizer*", "special_tokens_map.json", "generation_config.json", "*.jinja"):
        for path in Path(source).glob(pattern):
            shutil.copy(path, folder)


# --- adapter folders --------------------------------------------------------------------------

# What an adapter_config.json may ask for in one form only; every other setting is noted or moot.
PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"), False),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), {}),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices"), None),
}


def save_adapter(model: Llama, names: list[str], folder, base_name: str = ""):
    """Write the named adapters as one in PEFT's layout.

    Adapters of ranks r1, r2 are one of rank r1 + r2: their A's stacked, their scaled B's side by
    side: B1 A1 + B2 A2 = [B1 B2] [A1; A2]. Scales are multiplied into B, so alpha = r.
    """
    layers = lora_layers(model)
    chosen = {p: [a for n, a in x.adapters.items() if n in names] for p, x in layers.items()}
    chosen = {path: adapters for path, adapters in chosen.items() if adapters}
    r = max(sum(len(adapter.lora_A) for adapter in some) for some in chosen.values())
    tensors = {}
    for path, adapters in chosen.items():
        A = torch.cat([adapter.lora_A for adapter in adapters])  # [sum r, in]
        B = torch.cat(
            [adapter.scale * adapter.lora_B for adapter in adapters], dim=1
        )  # [out, sum r]
        room = r - len(A)  # where a layer has fewer adapters than another, zeros fill up
        tensors[f"base_model.model.{path}.lora_A.weight"] = F.pad(A, (0, 0, 0, room))
        tensors[f"base_model.model.{path}.lora_B.weight"] = F.pad(B, (0, room))
    config = PLAIN_LORA | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "target_modules": sorted({path.split(".")[-1] for path in chosen}),
        "inference_mode": True,
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with whole_folder(folder) as folder:
        write_json(folder / "adapter_config.json", config)
        path = folder / "adapter_model.safetensors"
        write_safetensors(path, shapes, torch.float32, tensors.__getitem__)


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
    add_adapter(model, name, config["r"], config["lora_alpha"], targets=",".join(paths))
    layers = lora_layers(model)
    for path in paths:
        for part in ("lora_A", "lora_B"):
            parameter = getattr(layers[path].adapters[name], part)
            saved = weights.pop(f"base_model.model.{path}.{part}.weight", None)
            if saved is None or saved.shape != tuple(parameter.shape):
                found = "missing" if saved is None else f"of shape {list(saved.shape)}"
                wanted = list(parameter.shape)
                raise InputError(f"{folder}: {path}.{part} is {found}, this model needs {wanted}")
            parameter.data.copy_(saved.read())
    if weights:
        raise InputError(f"{folder}: {next(iter(weights))} is not part of a LoRA adapter")


# --- training state ---------------------------------------------------------------------------


def save_state(path, model, optimizer, **progress):
    """Write all that an interrupted stage needs to go on: weights, Adam, random state, progress."""
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    state = {"trained": trained, "optimizer": optimizer.state_dict(), "progress": progress}
    state["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    with whole_file(path) as file:
        torch.save(state, file)


def load_state(path, model, optimizer) -> dict:
    """Put a saved state back into the model, the optimizer and torch; returns its progress."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])
    return state["progress"]
