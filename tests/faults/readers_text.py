"""More readers under fuzz, as in readers.py: settings, adapters, tokenizers."""

import json
import math
import shutil
from dataclasses import asdict

import hostile
import spec

from dpo_minimal.formats.huggingface import NO_EFFECT, load_llama, read_config
from dpo_minimal.formats.peft import load_adapter
from dpo_minimal.lora import lora_layers
from dpo_minimal.tokenizer import load_tokenizer

EITHER = object()  # the definition does not say: only that nothing breaks is asked


# --- settings ---------------------------------------------------------------------------------


def config(rng, folder, good, bad):
    """`read_config` of a config.json."""
    value = json.loads((good / "model" / "config.json").read_bytes())
    if bad and rng.random() < 0.4:
        rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        value[rng.choice(["rope_scaling", "rope_parameters"])] = rope | {"rope_theta": 5e5}
    if bad and rng.random() < 0.1:
        value["model_type"] = rng.choice(["mistral", "qwen2", None])
    value = hostile.change_json(rng, value) if bad else value
    path = folder / "config.json"
    path.write_bytes(hostile.json_bytes(rng, value) if bad else json.dumps(value).encode())

    def expect():
        return spec.config(path.read_bytes(), NO_EFFECT)

    return lambda: asdict(read_config(folder)), expect


# Keys of an adapter_config.json that PEFT documents as without effect on a finished adapter.
ADAPTER_IGNORED = {"task_type", "base_model_name_or_path", "inference_mode", "lora_dropout"}


def adapter(rng, folder, good, bad):
    """`load_adapter`: the numbers of each layer's A and scale times B."""
    from readers import hostile_weights

    shutil.copytree(good / "adapter", folder, dirs_exist_ok=True)
    path, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if bad and rng.random() < 0.5:
        path.write_bytes(hostile_weights(rng, path.read_bytes(), bad))
    elif bad:
        value = hostile.change_json(rng, json.loads(settings.read_bytes()))
        for key in [rng.choice(["r", "lora_alpha", "target_modules"])] * isinstance(value, dict):
            odd = [0, -1, 1.5, 10**9, math.nan, 2, "all-linear", ["q_proj"], ["q_proj", "o_proj"]]
            value[key] = rng.choice([*odd, ["q_proj", "v_proj", "c_attn"], ".*[qv]_proj", 10**400])
        settings.write_bytes(hostile.json_bytes(rng, value))

    def read():
        model = load_llama(good / "model", quantize=None)
        load_adapter(model, folder, "a")
        layers = {name: layer.adapters["a"] for name, layer in lora_layers(model).items()}
        found = {
            name: (a.lora_A.detach(), a.scale * a.lora_B.detach()) for name, a in layers.items()
        }
        return {name: (A.numpy(), B.numpy()) for name, (A, B) in found.items()}

    def expect():
        given, found = spec.strict_json(settings.read_bytes()), spec.safetensors(path.read_bytes())
        spec.need(spec.right(given.get("r"), int, 1, 2**14))
        spec.need(spec.right(given.get("lora_alpha"), float, 0, 1e9))
        beginning = given.pop("init_lora_weights", True)
        spec.need(not beginning or beginning in (True, "gaussian", "eva", "orthogonal"))
        plain = {"peft_type": "LORA", "bias": "none"}
        looked_at = {"r", "lora_alpha", "target_modules", *plain}
        for key, value in given.items():
            spec.need(not value or key not in plain or plain[key] == value)
            spec.need(not value or key in looked_at | ADAPTER_IGNORED, key)
        return expected_adapter(given, found)

    return read, expect


def expected_adapter(given: dict, found: dict) -> dict:
    """{layer: (A, scale B)}, if the weights are those of the layers that target_modules names."""
    layers, targets = {}, given.get("target_modules") or "all-linear"
    for i in range(2):
        for last in ("q_proj", "v_proj"):
            path = f"model.layers.{i}.self_attn.{last}"
            names = [f"base_model.model.{path}.lora_{x}.weight" for x in "AB"]
            spec.need(all(name in found for name in names))
            out = {"q_proj": 16, "v_proj": 8}[last]
            spec.need(found[names[0]][1] == [given["r"], 16])
            spec.need(found[names[1]][1] == [out, given["r"]])
            A, B = (spec.float32(*found.pop(name)) for name in names)
            layers[path] = (A, given["lora_alpha"] / given["r"] * B)
    spec.need(not found)
    if isinstance(targets, str):
        spec.need(targets != "all-linear")
        return layers
    spec.need(isinstance(targets, list) and all(isinstance(name, str) for name in targets))
    known = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    paths = [f"model.layers.{i}.{part}" for i in range(2) for part in full_names(known)]
    named = [p for p in paths if any(p == t or p.endswith("." + t) for t in targets)]
    spec.need(sorted(named) == sorted(layers))
    return layers


def full_names(last_names) -> list[str]:
    """The names of a block's linear layers within the block."""
    return [f"{'self_attn' if n[0] in 'qkvo' else 'mlp'}.{n}" for n in last_names]


# --- tokenizers -------------------------------------------------------------------------------


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(a protocol buffer's number, the place behind it)."""
    value = shift = 0
    while True:
        spec.need(at < len(data) and shift < 70)
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def fields(data: bytes):
    """Yield (number, value) of a protocol buffer's fields."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        else:
            spec.need(key & 7 in (1, 2, 5))
            size, at = varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            spec.need(at + size <= len(data))
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def sentencepiece(rng, folder, good, bad):
    """`load_tokenizer` of a tokenizer.model: its pieces, in order."""
    path, data = folder / "tokenizer.model", (good / "tokenizer" / "tokenizer.model").read_bytes()
    for _ in range(rng.randint(1, 3) if bad else 0):
        data = hostile.change_bytes(rng, data)
    path.write_bytes(data)

    def read():
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("Is it 12?", bos=True, eos=True))
        return [tokenizer.model.id_to_piece(i) for i in range(tokenizer.vocab_size)]

    def expect():
        pieces = [dict(fields(value)) for number, value in fields(data) if number == 1]
        return [piece.get(1, b"").decode("utf-8", "replace") for piece in pieces]

    return read, expect


def good_tokenizer_json() -> dict:
    """A small tokenizer.json: characters and some merges, with two special tokens."""
    words = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz .?", "th", "he", "the", "in", "an"]
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [{"id": i, "content": words[i]} | special for i in range(2)]
    merges = [["t", "h"], ["h", "e"], ["th", "e"], ["i", "n"], ["a", "n"]]
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    bpe |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    bpe |= {"vocab": {word: i for i, word in enumerate(words)}, "merges": merges}
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", "added_tokens": added, "model": bpe} | dict.fromkeys(names)


def tokenizer_json(rng, folder, good, bad):
    """`load_tokenizer` of a tokenizer.json and its settings: BOS, EOS and every word's id."""
    value, settings = good_tokenizer_json(), {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    first = bad and rng.random() < 0.6
    kinds = ["ByteLevel", "Metaspace", "Whitespace", "Sequence", "Split", "Strip", "Replace", "NFC"]
    if first and rng.random() < 0.4:
        part = rng.choice(["normalizer", "pre_tokenizer", "post_processor", "decoder"])
        odd = {
            "pattern": {"Regex": "(a+)+$"},
            "content": "",
            "normalizers": [],
            "pretokenizers": [],
        }
        value[part] = {"type": rng.choice(kinds), "start": 2**40, "stop": 1, "prefix": ""} | odd
    value = hostile.change_json(rng, value, 3) if first else value
    settings = hostile.change_json(rng, settings) if bad and not first else settings
    one, two = folder / "tokenizer.json", folder / "tokenizer_config.json"
    one.write_bytes(hostile.json_bytes(rng, value) if first else json.dumps(value).encode())
    two.write_bytes(json.dumps(settings).encode())
    if bad and not first:
        two.write_bytes(hostile.json_bytes(rng, settings))

    def read():
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("the anin hat?", bos=True, eos=True))
        return [tokenizer.bos_id, tokenizer.eos_id], tokenizer.model.get_vocab(True)

    def expect():
        given = spec.strict_json(two.read_bytes())
        texts = [given.get("bos_token"), given.get("eos_token")]
        texts = [text.get("content") if isinstance(text, dict) else text for text in texts]
        try:
            data = json.loads(one.read_bytes())
            known = dict(data["model"]["vocab"])
            known |= {t["content"]: known.get(t["content"], t["id"]) for t in data["added_tokens"]}
        except Exception:
            return EITHER  # the file's definition is the package's
        spec.need(all(isinstance(text, str) and text in known for text in texts))
        return ([known[text] for text in texts], known) if not first else EITHER

    return read, expect
