"""The readers under fuzz: for each, how a hostile input is made, read, and read independently.

A reader is a function of (seeded random numbers, an empty folder, the folder of good things,
whether the input shall be hostile). It writes an input into the empty folder, and gives back two
functions: `read()`, which goes through a public entry and returns a plain value, and `expect()`,
which returns the value that an independent reading gives, raises Refuse, or returns EITHER.
"""

import json
import shutil
import struct
import zipfile
from dataclasses import asdict
from pathlib import Path

import hostile
import numpy as np
import spec
import torch
from helpers import tiny_llama

from dpo_minimal.formats.huggingface import load_llama, save_llama
from dpo_minimal.formats.peft import save_adapter
from dpo_minimal.formats.safetensors import open_safetensors
from dpo_minimal.lora import add_adapter, lora_layers
from dpo_minimal.tokenizer import train_tokenizer

SHAPE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}


def make_good(folder: Path):
    """The good inputs that are made hostile: a model in four layouts, an adapter, tokenizers."""
    from test_checkpoint import meta_folder

    model = tiny_llama(torch.float32, head_dim=4)
    save_llama(model, folder / "model", torch.float32)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    (folder / "bin").mkdir()
    shutil.copy(folder / "model" / "config.json", folder / "bin")
    torch.save(tensors, folder / "bin" / "pytorch_model.bin")
    meta_folder(model, folder / "meta")
    add_adapter(model, "sft", r=2, alpha=4, targets="q_proj,v_proj")
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.adapters["sft"].lora_B)
    save_adapter(model, ["sft"], folder / "adapter")
    (folder / "tokenizer").mkdir()
    texts = [f"Is it {i}? Yes, it is {i * i}, and not {i + 1}." for i in range(99)]
    train_tokenizer(texts, 300, folder / "tokenizer" / "tokenizer.model")


def weights_of(model) -> dict:
    """A model's numbers by name."""
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


# --- weights ----------------------------------------------------------------------------------


def change_header(rng, data: bytes) -> bytes:
    """A safetensors file with something wrong in its header."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name, other = rng.sample([name for name in header if name != "__metadata__"], 2)
    how, entry = rng.randrange(9), header[name]
    if how == 0:  # overlap: one tensor's bytes are another's
        entry["data_offsets"] = list(header[other]["data_offsets"])
    elif how == 1:
        entry["data_offsets"] = [
            offset + rng.choice([1, 4, -4]) for offset in entry["data_offsets"]
        ]
    elif how == 2:
        kinds = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "C64", "F8_E4M3"]
        kinds += 5 * ["I32"]  # of the right size
        entry["dtype"] = rng.choice(kinds)
    elif how == 3:
        entry["shape"] = rng.choice([[2**40, 2**40], [0], [], [-1], [True], [16.0], None, 3, "16"])
    elif how == 4:
        body += b"\0" * rng.choice([1, 8, 1000])
    elif how == 5:
        header[rng.choice(["extra", "model.rotary_emb.inv_freq", "lm_head"])] = header.pop(name)
    elif how == 6:  # the same name twice
        text = json.dumps(header).encode()
        text = text[:-1] + b", " + json.dumps(name).encode() + b": " + json.dumps(entry).encode()
        return struct.pack("<Q", len(text) + 1) + text + b"}" + body
    elif how == 7:  # NaN, infinity, a number of another sign
        at = 4 * rng.randrange(len(body) // 4)
        number = rng.choice([np.nan, np.inf, -np.inf, -3.0])
        body = body[:at] + struct.pack("<f", number) + body[at + 4 :]
    else:
        header = hostile.change_json(rng, header)
    text = hostile.json_bytes(rng, header)
    length = len(text) if rng.random() < 0.95 else rng.choice([2**63, 0, len(text) + 5, 10**9])
    return struct.pack("<Q", length) + text + body


def hostile_weights(rng, data: bytes, bad: bool) -> bytes:
    """A safetensors file, mostly with a wrong header, at times with wrong bytes anywhere."""
    if not bad:
        return data
    return change_header(rng, data) if rng.random() < 0.8 else hostile.change_bytes(rng, data)


def safetensors(rng, folder, good, bad):
    """`open_safetensors`, every tensor read."""
    path, data = folder / "x.safetensors", (good / "model" / "model.safetensors").read_bytes()
    path.write_bytes(hostile_weights(rng, data, bad))

    def read():
        tensors = {name: lazy.read() for name, lazy in open_safetensors(path).items()}
        return {
            n: (list(t.shape), t.flatten().view(torch.uint8).numpy()) for n, t in tensors.items()
        }

    def expect():
        found = spec.safetensors(path.read_bytes()).items()
        return {name: (shape, np.frombuffer(raw, np.uint8)) for name, (_, shape, raw) in found}

    return read, expect


def expected_weights(tensors: dict, names: dict) -> dict:
    """{name: float32} of the parsed tensors. names: {name: shape} of what the model has."""
    kept = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    spec.need(kept.keys() == names.keys())
    for name, (_, shape, _) in kept.items():
        spec.need(tuple(shape) == names[name])
    return {name: spec.float32(*tensor) for name, tensor in kept.items()}


def names_of(good: Path) -> dict:
    """{name: shape} of the good model's tensors."""
    tensors = spec.safetensors((good / "model" / "model.safetensors").read_bytes())
    return {name: tuple(shape) for name, (_, shape, _) in tensors.items()}


def model(rng, folder, good, bad):
    """`load_llama` of a folder with a model.safetensors."""
    shutil.copytree(good / "model", folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"
    path.write_bytes(hostile_weights(rng, path.read_bytes(), bad))

    def expect():
        return expected_weights(spec.safetensors(path.read_bytes()), names_of(good))

    return lambda: weights_of(load_llama(folder, quantize=None)), expect


def shards(rng, folder, good, bad):
    """`load_llama` of a folder with an index and two shards."""
    shutil.copy(good / "model" / "config.json", folder)
    tensors = spec.safetensors((good / "model" / "model.safetensors").read_bytes())
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for part in sorted(set(places.values())):
        header, body = {}, b""
        for name in (name for name, place in places.items() if place == part):
            dtype, shape, raw = tensors[name]
            span = [len(body), len(body) + len(raw)]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
            body += raw
        text = json.dumps(header).encode()
        (folder / part).write_bytes(struct.pack("<Q", len(text)) + text + body)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    index = hostile.change_json(rng, index) if bad else index
    path = folder / "model.safetensors.index.json"
    path.write_bytes(hostile.json_bytes(rng, index) if bad else json.dumps(index).encode())

    def expect():
        given = spec.strict_json(path.read_bytes()).get("weight_map")
        spec.need(isinstance(given, dict))
        spec.need(all(given.get(name) == place for name, place in places.items()))
        spec.need(given.keys() == places.keys())
        return expected_weights(tensors, names_of(good))

    return lambda: weights_of(load_llama(folder, quantize=None)), expect


def hostile_tensors(rng, tensors: dict):
    """An object to torch.save in place of tensors by name."""
    names = [name for name in tensors if name != "rope.freqs"]  # which is computed anew
    name, how = rng.choice(names), rng.randrange(14)
    changed = [None, 3, "x", [tensors[name]], {"a": tensors[name]}, tensors[name].int()]
    changed += [tensors[name] > 0, tensors[name].to(torch.complex64), tensors[name].to_sparse()]
    changed += [tensors[name].flatten()[:1].clone().expand(10**6, 10**6), tensors[name] * torch.nan]
    if how < len(changed):
        return tensors | {name: changed[how]}
    if how == 11:
        return {"model": tensors}
    if how == 12:
        return list(tensors.values())
    return {3: tensors.pop(name)} | tensors


def bin_file(rng, folder, good, bad):
    """`load_llama` of a folder with a pytorch_model.bin."""
    shutil.copytree(good / "bin", folder, dirs_exist_ok=True)
    path, objects = folder / "pytorch_model.bin", bad and rng.random() < 0.6
    tensors = torch.load(path, weights_only=True)
    if objects:
        torch.save(hostile_tensors(rng, dict(tensors)), path)
    elif bad:
        path.write_bytes(hostile.change_bytes(rng, path.read_bytes()))

    def expect():
        if not bad:
            return {name: t.numpy() for name, t in tensors.items()}
        spec.need(not objects)
        try:  # the bytes that a general reader of zip files finds for each tensor, in order
            with zipfile.ZipFile(path) as file:
                numbers = [n for n in file.namelist() if "/data/" in n]
                starts = [file.getinfo(n).header_offset for n in numbers]
        except Exception as error:
            raise spec.Refuse(str(error)) from None
        spec.need(len(starts) == len(tensors))
        loaded = torch.load(path, weights_only=True)  # without memory mapping: another way
        return {name: t.numpy() for name, t in loaded.items()}

    return lambda: weights_of(load_llama(folder, quantize=None)), expect


def meta(rng, folder, good, bad):
    """`load_llama` of a folder in Meta's layout."""
    shutil.copytree(good / "meta", folder, dirs_exist_ok=True)
    params_path, path = folder / "params.json", folder / "consolidated.00.pth"
    params = json.loads(params_path.read_bytes())
    extra = {"rope_theta": 10000.0, "max_seq_len": 64, "use_scaled_rope": False}
    if bad and rng.random() < 0.7:
        params_path.write_bytes(hostile.json_bytes(rng, hostile.change_json(rng, params | extra)))
    elif bad:
        torch.save(hostile_tensors(rng, dict(torch.load(path, weights_only=True))), path)
    right_file = path.read_bytes() == (good / "meta" / path.name).read_bytes()

    def read():
        loaded = load_llama(folder, quantize=None)
        return weights_of(loaded) | {"config": asdict(loaded.config)}

    def expect():
        spec.need(right_file)
        given = {k: v for k, v in spec.strict_json(params_path.read_bytes()).items() if v}
        scaled = given.pop("use_scaled_rope", False)
        factor = given.pop("rope_scaling_factor", 32.0)
        spec.need(given.pop("vocab_size", -1) in (-1, 32) and type(scaled) is bool)
        given.pop("multiple_of", 0)
        right = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
        for key, value in right.items():  # whatever else they say contradicts the weights
            spec.need(type(given.get(key)) is int and given.pop(key) == value)
        raw = spec.strict_json(params_path.read_bytes())
        ranges = {"norm_eps": (float, 0, 1), "rope_theta": (float, 1, 1e12)}
        ranges["max_seq_len"] = (int, 1, 2**30)
        for key, limits in ranges.items():
            spec.need(key not in raw or spec.right(raw[key], *limits), key)
            given.pop(key, None)
        spec.need(not given and "norm_eps" in raw and spec.right(factor, float, 1, 1e6))
        fields = dict(SHAPE, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        fields |= dict(rms_norm_eps=raw["norm_eps"], rope_theta=raw.get("rope_theta", 10000.0))
        fields["max_position_embeddings"] = raw.get("max_seq_len", 4096)
        fields |= dict(tie_word_embeddings=False, initializer_range=0.02, rope_scaling=None)
        if scaled:
            fields["rope_scaling"] = {"rope_type": "llama3", "factor": factor}
            fields["rope_scaling"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            fields["rope_scaling"]["original_max_position_embeddings"] = 8192
        tensors = spec.safetensors((good / "model" / "model.safetensors").read_bytes())
        return expected_weights(tensors, names_of(good)) | {"config": fields}

    return read, expect
