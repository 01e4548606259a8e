"""Model folders in the Hugging Face layout: config.json and weights, read and written.

Weights are read as safetensors or with `weights_only=True`: nothing in a folder is executed.
"""

import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import nn

from dpo_minimal import InputError
from dpo_minimal.extras import progress
from dpo_minimal.extras.reading import read_json
from dpo_minimal.extras.skeleton import skeleton
from dpo_minimal.files import whole_folder, write_json
from dpo_minimal.formats.bounds import ROPE_BOUNDS, check_bounds
from dpo_minimal.formats.meta import is_meta_folder, open_meta_folder
from dpo_minimal.formats.pickled import open_bin
from dpo_minimal.formats.safetensors import LazyTensor, open_safetensors, write_safetensors
from dpo_minimal.llama import Llama, LlamaConfig
from dpo_minimal.lora import linear_layers, merged_weight
from dpo_minimal.nf4 import NF4Linear, quantize_nf4

SHARD_BYTES = 5 * 10**9
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Keys of a config.json for which one value is implemented, and keys that change no computation.
# Mistral from 7B v0.3 on is a Llama by another name; before, it had a sliding window.
ONLY = {
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu",),
    "architectures": (["LlamaForCausalLM"], ["MistralForCausalLM"]),
}
NO_EFFECT = {
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "is_llama_config",
    "max_sequence_length",
    "pad_token_id",
    "pretraining_tp",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "use_cache",
}


# --- config.json ------------------------------------------------------------------------------


def parse_config(config: dict) -> LlamaConfig:
    """A `config.json` as a LlamaConfig; InputError names what it asks for and is not here."""
    given = dict(config)
    given.setdefault("model_type", None)
    if given["model_type"] == "mistral":  # what it means where it says nothing
        given = {"sliding_window": 4096, "num_key_value_heads": 8} | given
    new, old = given.pop("rope_parameters", None), given.get("rope_scaling")
    if new and old and new != old:
        raise InputError("config.json has rope_parameters and another rope_scaling")
    rope = new or old or {}
    given["rope_scaling"] = read_rope_scaling("rope_parameters" if new else "rope_scaling", rope)
    thetas = [rope.get("rope_theta"), given.get("rope_theta"), LlamaConfig.rope_theta]
    given["rope_theta"] = next(theta for theta in thetas if theta is not None)
    names = {field.name for field in fields(LlamaConfig)}
    for key, value in given.items():
        if key in ONLY:
            refused = value not in ONLY[key] and (value is not None or key == "model_type")
        else:
            # A key that is switched off (None, False, 0) or a private note asks for nothing.
            refused = value and not key.startswith("_") and key not in names | NO_EFFECT
        if refused:
            raise InputError(f"config.json asks for {key} = {value!r}: not implemented here")
    check_bounds(given)
    try:
        return LlamaConfig(**{key: value for key, value in given.items() if key in names})
    except TypeError as error:  # "missing 1 required positional argument: 'hidden_size'"
        raise InputError(f"config.json lacks a field: {error}") from None


def read_rope_scaling(key: str, rope: dict) -> dict | None:
    """Llama 3's scaling out of a config's rope settings, None for none, InputError for others."""
    if not isinstance(rope, dict):
        raise InputError(f"config.json asks for {key} = {rope!r}: not implemented here")
    check_bounds(rope, ROPE_BOUNDS)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    wanted = names if kind == "llama3" else ()
    extra = rope.keys() - {"rope_type", "type", "rope_theta", *wanted}
    if kind not in ("default", "llama3") or extra or any(name not in rope for name in wanted):
        raise InputError(f"config.json asks for {key} = {rope!r}: not implemented here")
    if wanted and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise InputError(f"config.json's {key}: low_freq_factor is not below high_freq_factor")
    return {"rope_type": kind} | {name: rope[name] for name in wanted} if wanted else None


def read_config(folder) -> LlamaConfig:
    """A model folder's config; InputError if there is none or it asks for what is not here."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    if is_meta_folder(folder):
        return open_meta_folder(folder)[0]
    config = read_json(folder / "config.json")
    try:
        return parse_config(config)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def config_json(config: LlamaConfig, dtype: torch.dtype, source=None) -> dict:
    """A `config.json` that transformers reads, with the special ids of the folder `source`."""
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    if source and (Path(source) / "config.json").exists():
        given = read_json(Path(source) / "config.json")
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        fixed |= {name: given[name] for name in names if name in given}
    return fixed | asdict(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}


# --- weights ----------------------------------------------------------------------------------


def open_weights(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a folder by name, from whichever of the four usual files it has."""
    if is_meta_folder(folder):
        return open_meta_folder(folder)[1]
    readers = {"model.safetensors": open_safetensors, "pytorch_model.bin": open_bin}
    for single, reader in readers.items():
        index = folder / f"{single}.index.json"
        if index.exists():
            return open_shards(index, reader)
        if (folder / single).exists():
            return reader(folder / single)
    raise InputError(f"{folder}: no model.safetensors, no pytorch_model.bin and no index of shards")


def open_shards(index: Path, reader) -> dict[str, LazyTensor]:
    """The tensors that an index names, each from the file of the same folder that it names."""
    places = read_json(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else [None]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: its weight_map says {name!r} and not a file beside it")
    shards = {name: reader(index.parent / name) for name in sorted(set(names))}
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise InputError(f"{index}: says that {tensor} is in {name}, which lacks it")
    return {tensor: shards[name][tensor] for tensor, name in places.items()}


def load_llama(folder, device="cpu", dtype=torch.float32, quantize: str | None = "nf4") -> Llama:
    """A Llama from a folder in the Hugging Face (or Meta) layout.

    quantize "nf4" turns each linear layer but the head into NF4 as it is read, so that the model
    never exists in 16 bits in memory; None keeps all weights in `dtype`. Quantized weights are
    frozen, the others trainable. InputError names what is unreadable, unsupported, missing, extra
    or misshapen.
    """
    folder, config = Path(folder), read_config(folder)
    weights = open_weights(folder)
    model = skeleton(config)
    check_tensors(folder, model, weights)
    modules = list(model.named_modules())
    for done, (path, module) in enumerate(modules):
        progress.show(f"reading {folder}", done, len(modules), "modules")
        for name, _ in list(module.named_parameters(recurse=False)):
            if path == "lm_head" and config.tie_word_embeddings:
                continue
            weight = weights.pop(f"{path}.{name}").read().to(device)
            if quantize and isinstance(module, nn.Linear) and path != "lm_head":
                # From the file's own dtype: going through `dtype` first would change nibbles.
                quantized = replace(quantize_nf4(weight), dtype=dtype)
                model.set_submodule(path, NF4Linear(quantized))
                finite = quantized.absmax_offset.isfinite()  # a mean over all blocks' maxima
            else:
                weight = weight.to(dtype)
                setattr(module, name, nn.Parameter(weight))
                finite = weight.isfinite().all()
            if not finite:
                raise InputError(f"{folder}: {path}.{name} holds NaN or infinite numbers")
    model.tie()
    return model


def check_tensors(folder, model: Llama, weights: dict):
    """InputError unless the folder has exactly the model's tensors, in their shapes."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    # Old checkpoints carry these buffers; a tied head's own copy says nothing new.
    extras = tied | {name for name in weights if name.endswith("rotary_emb.inv_freq")}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in shapes.keys() - weights.keys() - tied:
        raise InputError(f"{folder}: the tensor {name} is missing from the weights")
    for name in weights.keys() - shapes.keys() - extras:
        raise InputError(f"{folder}: the tensor {name} is not part of this Llama")
    for name in shapes.keys() & weights.keys():
        if weights[name].dtype not in FLOATS:
            raise InputError(f"{folder}: {name} is of {weights[name].dtype}: no weights")
        if weights[name].shape != shapes[name]:
            raise InputError(
                f"{folder}: {name} has shape {list(weights[name].shape)}, config.json asks for "
                f"{list(shapes[name])}"
            )


def save_llama(
    model: Llama, folder, dtype: torch.dtype = torch.bfloat16, tokenizer_from=None, add=None
):
    """Write a plain Hugging Face folder: the dequantized base with the active adapters added.

    The model is left as it is, because one layer at a time is merged. tokenizer_from: a folder
    whose tokenizer and generation settings are copied along. add(folder): puts more files there.
    """
    shapes = {name: p.shape for name, p in skeleton(model.config).named_parameters()}
    layers = linear_layers(model)

    def read(name):
        layer = layers.get(name.removesuffix(".weight"))
        return model.get_parameter(name) if layer is None else merged_weight(layer)

    with whole_folder(folder) as folder:
        write_json(folder / "config.json", config_json(model.config, dtype, tokenizer_from))
        write_shards(folder, shapes, dtype, read)
        if tokenizer_from:
            copy_tokenizer(tokenizer_from, folder)
        if add:
            add(folder)


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
            if path.is_file():
                shutil.copy(path, folder)
