"""Meta's own layout of a Llama: params.json and consolidated.*.pth, translated as it is read."""

from pathlib import Path

import torch

from dpo_minimal import InputError
from dpo_minimal.extras.reading import read_json
from dpo_minimal.formats.bounds import ROPE_BOUNDS, check_bounds
from dpo_minimal.formats.pickled import load_tensors
from dpo_minimal.formats.safetensors import LazyTensor
from dpo_minimal.llama import LlamaConfig

NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# Keys of params.json; the first three are about the width of the MLP, which the weights tell.
KNOWN = {
    "ffn_dim_multiplier", "multiple_of", "max_batch_size", "dim", "max_seq_len", "n_heads",
    "n_kv_heads", "n_layers", "norm_eps", "rope_scaling_factor", "rope_theta", "use_scaled_rope",
}  # fmt: skip
# 13B and 70B come in several files. These weights are cut by column, others by row, norms not.
SPLIT_BY_COLUMN = ("attention.wo", "feed_forward.w2")


def lazy_tensor(slices: list[torch.Tensor], axis: int | None, heads: int | None) -> LazyTensor:
    """One tensor of a Meta checkpoint in the Hugging Face layout.

    slices: its parts in all files, joined along `axis` when it is read (None: each file has all of
    it). heads: of a q or k projection, whose rows are then reordered; None elsewhere.
    """
    shape = list(slices[0].shape)
    if axis is not None:
        shape[axis] = sum(part.shape[axis] for part in slices)
    for part in slices:
        if any(part.shape[i] != n for i, n in enumerate(shape) if i != axis):
            raise IndexError

    def read():
        tensor = slices[0] if axis is None else torch.cat(slices, dim=axis)
        return tensor if heads is None else to_half_split(tensor, heads)

    return LazyTensor(tuple(shape), slices[0].dtype, read)


def is_meta_folder(folder: Path) -> bool:
    """Whether a folder is in Meta's layout and not also in the Hugging Face one."""
    return (folder / "params.json").exists() and not (folder / "config.json").exists()


def to_half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder a q or k projection [heads * K, D] from interleaved rotary planes to half-split.

    Meta turns the rows (0, 1), (2, 3), ... of a head together; Hugging Face and this project turn
    (0, K/2), (1, K/2 + 1), ... So the even rows go first, then the odd ones.
    """
    out, size = weight.shape
    return weight.view(heads, out // heads // 2, 2, size).transpose(1, 2).reshape(out, size)


def open_meta_folder(folder) -> tuple[LlamaConfig, dict]:
    """(config, {Hugging Face name: LazyTensor}) of a folder with params.json."""
    folder = Path(folder)
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise InputError(f"{folder}: params.json, but no consolidated.00.pth beside it")
    params = read_json(folder / "params.json")
    shards = [load_tensors(file) for file in files]
    try:
        return translate(params, shards)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    except KeyError as error:
        raise InputError(f"{folder}: params.json or the weights lack {error}") from None
    except IndexError:  # a name without its layer, a tensor with too few axes
        raise InputError(f"{folder}: not a Meta checkpoint (names or shapes are others)") from None


def translate(params: dict, shards: list[dict]) -> tuple[LlamaConfig, dict]:
    """Meta's parameters, names and slices as ours; KeyError for what is missing."""
    heads = params["n_heads"]
    groups = params.get("n_kv_heads") or heads
    tensors = {}
    if any(shard.keys() != shards[0].keys() for shard in shards):
        raise InputError("the files do not hold parts of the same tensors")
    for name in shards[0]:
        if name == "rope.freqs":
            continue
        path = name.removesuffix(".weight").split(".")
        layer, part = (path[1], ".".join(path[2:])) if path[0] == "layers" else (None, path[0])
        if part not in NAMES:
            raise InputError(f"the tensor {name} is not part of a Llama")
        target = NAMES[part] if layer is None else f"model.layers.{layer}.{NAMES[part]}"
        rotated = {"attention.wq": heads, "attention.wk": groups}.get(part)
        slices = [shard[name] for shard in shards]
        axis = split_axis(part, slices, params["dim"])
        tensors[f"{target}.weight"] = lazy_tensor(slices, axis, rotated)
    return read_params(params, tensors), tensors


def split_axis(part: str, slices: list[torch.Tensor], width: int) -> int | None:
    """The axis along which a tensor is cut over the files; None where each file has all of it."""
    if len(slices) == 1 or slices[0].dim() == 1:
        return None
    if part == "tok_embeddings":  # Llama 2 cuts the width, Llama 3 the vocabulary
        return 0 if slices[0].shape[1] == width else 1
    return 1 if part in SPLIT_BY_COLUMN else 0


def read_params(params: dict, tensors: dict) -> LlamaConfig:
    """params.json as a config; sizes that it leaves out are read off the tensors."""
    vocab_size = tensors["model.embed_tokens.weight"].shape[0]
    for key, value in params.items():
        right = value in (-1, vocab_size) if key == "vocab_size" else key in KNOWN
        if value and not right:
            raise InputError(f"params.json asks for {key} = {value!r}, which is not here")
    sizes = dict(
        vocab_size=vocab_size,
        hidden_size=params["dim"],
        intermediate_size=tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads"),
        max_position_embeddings=params.get("max_seq_len", 4096),
        rms_norm_eps=params["norm_eps"],
        rope_theta=params.get("rope_theta", 10000.0),
        tie_word_embeddings="lm_head.weight" not in tensors,
    )
    check_bounds(sizes | {"use_scaled_rope": params.get("use_scaled_rope", False)})
    scaling = None
    if params.get("use_scaled_rope"):  # from Llama 3.1 on; the small models of 3.2 scale by 32
        default_factor = 32.0 if params["dim"] < 4096 else 8.0
        scaling = {
            "rope_type": "llama3",
            "factor": params.get("rope_scaling_factor", default_factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        check_bounds(scaling, ROPE_BOUNDS)
    return LlamaConfig(**sizes, rope_scaling=scaling)
