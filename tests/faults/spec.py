"""Independent readings of what the readers read: from the formats' definitions, in plain Python.

Each raises Refuse for what must not be accepted.
"""

import json
import math
import struct

import numpy as np


class Refuse(Exception):
    """By the format's definition, or by the project's documents, this must be refused."""


def need(condition, why="out of the definition"):
    """Refuse unless the condition holds."""
    if not condition:
        raise Refuse(why)


def no_repeats(pairs):
    """Refuse a JSON object with a key that is there twice."""
    need(len(pairs) == len(dict(pairs)), "a key twice")
    return dict(pairs)


def strict_json(data: bytes) -> dict:
    """The JSON object of a file."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=no_repeats)
    except (ValueError, RecursionError) as error:
        raise Refuse(str(error)) from None
    need(isinstance(value, dict))
    return value


SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1}


def safetensors(data: bytes) -> dict:
    """{name: (dtype, shape, bytes)}; the bytes must be used up once, without holes."""
    need(len(data) >= 8)
    (length,) = struct.unpack("<Q", data[:8])
    need(length <= len(data) - 8)
    header, body = strict_json(data[8 : 8 + length]), data[8 + length :]
    tensors, used = {}, np.zeros(len(body), int)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        need(isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= entry.keys())
        shape, span = entry["shape"], entry["data_offsets"]
        need(isinstance(shape, list) and isinstance(span, list) and len(span) == 2)
        need(all(type(n) is int and n >= 0 for n in shape + span))
        need(isinstance(entry["dtype"], str) and entry["dtype"] in SIZES)
        need(span[1] - span[0] == SIZES[entry["dtype"]] * math.prod(shape) and span[1] <= len(body))
        used[span[0] : span[1]] += 1
        tensors[name] = (entry["dtype"], shape, body[span[0] : span[1]])
    need((used == 1).all(), "overlaps or holes")
    return tensors


def float32(dtype: str, shape, data: bytes) -> np.ndarray:
    """A tensor of weights as float32 numbers that are finite."""
    need(dtype[0] in "FB")
    if dtype == "BF16":
        wide = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        wide = np.frombuffer(data, f"<f{SIZES[dtype]}")
    with np.errstate(over="ignore"):
        values = wide.astype(np.float32).reshape(shape)
    need(np.isfinite(values).all(), "not finite")
    return values


# (type, lowest, highest, what holds where config.json says nothing)
CONFIG = {
    "vocab_size": (int, 1, 2**22, ...),
    "hidden_size": (int, 1, 2**22, ...),
    "intermediate_size": (int, 1, 2**22, ...),
    "num_hidden_layers": (int, 1, 512, ...),
    "num_attention_heads": (int, 1, 2**14, ...),
    "num_key_value_heads": (int, 1, 2**14, None),
    "head_dim": (int, 1, 2**14, None),
    "max_position_embeddings": (int, 1, 2**30, 2048),
    "rms_norm_eps": (float, 0, 1, 1e-6),
    "rope_theta": (float, 1, 1e12, 10000.0),
    "tie_word_embeddings": (bool, 0, 1, False),
    "initializer_range": (float, 0, 1000, 0.02),
}
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def right(value, kind, low, high) -> bool:
    """Whether a value has the type and is in its range."""
    kinds = {int: (int,), float: (int, float), bool: (bool,)}[kind]
    return type(value) in kinds and low <= value <= high


def config(data: bytes, ignored) -> dict:
    """What a config.json says, field by field. ignored: keys documented as without effect."""
    given = strict_json(data)
    need(given.get("model_type") in ("llama", "mistral"))
    need(given.get("hidden_act") in (None, "silu"))
    need(given.get("architectures") in (None, ["LlamaForCausalLM"], ["MistralForCausalLM"]))
    if given["model_type"] == "mistral":
        given = {"sliding_window": 4096, "num_key_value_heads": 8} | given
    fields = {}
    new, old = given.pop("rope_parameters", None), given.pop("rope_scaling", None)
    need(not (new and old) or new == old)
    rope = new or old or {}
    need(isinstance(rope, dict))
    if rope.get("rope_theta") is not None:
        given["rope_theta"] = rope["rope_theta"]
    for name, (kind, low, high, default) in CONFIG.items():
        fields[name] = given.pop(name, default)
        if name == "rope_theta" and fields[name] is None:
            fields[name] = default
        need(default is None and fields[name] is None or right(fields[name], kind, low, high), name)
    need(not any(v for k, v in given.items() if not known(k, ignored)), "an unknown setting")
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or heads
    if fields["head_dim"] is None:
        need(fields["hidden_size"] % heads == 0)
        fields["head_dim"] = fields["hidden_size"] // heads
    need(heads % fields["num_key_value_heads"] == 0 and fields["head_dim"] % 2 == 0)
    return fields | {"rope_scaling": rope_scaling(rope)}


def known(key: str, ignored) -> bool:
    """Whether a key of config.json was looked at, or is documented as ignored."""
    return key.startswith("_") or key in ignored | {"model_type", "hidden_act", "architectures"}


def rope_scaling(rope: dict):
    """Llama 3's scaling, or None."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    need(kind in ("default", "llama3"))
    wanted = set(ROPE) if kind == "llama3" else set()
    need(rope.keys() - {"rope_type", "type", "rope_theta"} == wanted)
    if not wanted:
        return None
    need(all(right(rope[name], float, 1e-6, 2**30) for name in ROPE))
    need(right(rope["factor"], float, 1, 1e6) and right(rope[ROPE[3]], int, 1, 2**30))
    need(rope["low_freq_factor"] < rope["high_freq_factor"])
    return {"rope_type": kind} | {name: rope[name] for name in ROPE}


def pairs(rows) -> list:
    """The pairs of preference rows in the plain, instruction, stack-exchange and HH forms."""
    found = []
    for row in rows:
        need(isinstance(row, dict))
        if "response_j" in row:
            texts = [row.get(name) for name in ("question", "response_j", "response_k")]
        else:
            name = "instruction" if "instruction" in row else "prompt"
            texts = [row.get(name), row.get("chosen"), row.get("rejected")]
        need(row.get("input") is None or isinstance(row["input"], str), "not text")
        if not {"response_j", "instruction", "prompt"} & row.keys() and isinstance(texts[1], str):
            texts = dialogue(texts[1], texts[2])
        elif row.get("input") and isinstance(texts[0], str):
            texts[0] += "\n" + row["input"]
        need(all(isinstance(text, str) for text in texts), "not text")
        need(not any("\ud800" <= letter <= "\udfff" for text in texts for letter in text))
        useful = texts[1].strip() and texts[2].strip() and texts[1] != texts[2]
        if useful and max(map(len, texts)) <= 2**20:
            found.append(tuple(texts))
    need(found, "no pair")
    return found


def dialogue(chosen, rejected):
    """The prompt and the answers of two dialogues with a common beginning."""
    need(isinstance(rejected, str))
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    head, turn, _ = chosen[:n].rpartition("\n\nAssistant:")
    need(turn)
    cut = len(head) + len(turn)
    human = "\n\nHuman:"
    prompt = head[len(human) :] if head.startswith(human) else head
    return [prompt.strip(), chosen[cut:].strip(), rejected[cut:].strip()]
