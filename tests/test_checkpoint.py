"""Files: safetensors by hand, model folders, adapter folders, Meta's layout, training state."""

import io
import json
import pickle
import shutil
import struct
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import fill_adapter, quantize_model, random_tokens, tiny_llama

from dpo_minimal import InputError
from dpo_minimal.checkpoint import load_adapter, load_llama, save_adapter, save_llama
from dpo_minimal.files import read_sealed, whole_file, whole_folder
from dpo_minimal.formats import huggingface
from dpo_minimal.formats.safetensors import open_safetensors, write_safetensors
from dpo_minimal.loop import load_state, save_state
from dpo_minimal.lora import active_adapters, add_adapter, linear_layers, lora_layers
from dpo_minimal.nf4 import NF4Linear, dequantize_nf4, quantize_nf4

TOKENS = random_tokens(2, 7)


def close(a, b, atol=0.0):
    """Assert that two tensors are equal to atol: without one, to the last bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def safetensors_bytes(header, data=b"", length=None):
    """A safetensors file put together from its definition."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_model(model, folder, **changed):
    """Save a model's own tensors as a Hugging Face folder; `changed`: tensors by name, or None."""
    save_llama(model, folder, torch.float32)
    tensors = {name: t.detach() for name, t in model.named_parameters()} | changed
    tensors = {name: t for name, t in tensors.items() if t is not None}
    shapes = {name: t.shape for name, t in tensors.items()}
    path = folder / "model.safetensors"
    write_safetensors(path, shapes, torch.float32, tensors.__getitem__)
    return folder


# safetensors.


def test_a_safetensors_file_written_by_hand_is_read(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]},  # not in order
        "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        "c": {"dtype": "U8", "shape": [3], "data_offsets": [20, 23]},
        "d": {"dtype": "F16", "shape": [], "data_offsets": [23, 25]},
    }
    # bfloat16 is the upper half of float32: 1.0 is 3f80, -2.0 is c000; float16 1.5 is 3e00
    data = bytes.fromhex("803f00c0") + struct.pack("<4f", 1, 2, 3, 4.5) + bytes([7, 8, 255])
    data += bytes.fromhex("003e")
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header, data))
    tensors = {name: lazy.read() for name, lazy in open_safetensors(path).items()}
    assert tensors.keys() == {"a", "b", "c", "d"}
    assert tensors["a"].dtype == torch.bfloat16 and tensors["a"].tolist() == [1.0, -2.0]
    assert tensors["b"].dtype == torch.float32 and tensors["b"].tolist() == [[1, 2], [3, 4.5]]
    assert tensors["c"].dtype == torch.uint8 and tensors["c"].tolist() == [7, 8, 255]
    assert tensors["d"].dtype == torch.float16 and tensors["d"].item() == 1.5


def test_a_safetensors_file_that_was_written_follows_the_format(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.tensor([[1.0, 2.0]]).T, "b": torch.tensor(-2.0)}  # a: not contiguous
    shapes = {name: t.shape for name, t in tensors.items()}
    write_safetensors(path, shapes, torch.bfloat16, tensors.__getitem__)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header["a"] == {"dtype": "BF16", "shape": [2, 1], "data_offsets": [0, 4]}
    assert header["b"] == {"dtype": "BF16", "shape": [], "data_offsets": [4, 6]}
    assert content[8 + length :] == bytes.fromhex("803f0040" + "00c0")


def test_the_data_of_a_safetensors_file_are_aligned_to_8_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    for letters in range(1, 9):  # whatever the header's own length is
        name = "a" * letters
        write_safetensors(path, {name: (1,)}, torch.float32, lambda name: torch.ones(1))
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert length % 8 == 0 and content[8 + length :] == bytes.fromhex("0000803f")
        assert json.loads(content[8 : 8 + length])[name]["dtype"] == "F32"


ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\0\0",
        safetensors_bytes(ONE, bytes(8))[:-1],  # cut off in the data
        safetensors_bytes(ONE, bytes(8))[:30],  # cut off in the header
        safetensors_bytes(ONE, bytes(8), length=2**62),
        safetensors_bytes(b'{"a": ', bytes(8)),
        safetensors_bytes(b"[1, 2]", bytes(8)),
        safetensors_bytes(b"\xff\xfe\xfd", bytes(8)),
        safetensors_bytes({"a": ONE["a"] | {"data_offsets": [0, 4]}}, bytes(8)),
        safetensors_bytes({"a": ONE["a"] | {"data_offsets": [-8, 0]}}, bytes(8)),
        safetensors_bytes({"a": ONE["a"] | {"data_offsets": [0]}}, bytes(8)),
        safetensors_bytes({"a": ONE["a"] | {"shape": [-1, -2]}}, bytes(8)),
        safetensors_bytes({"a": ONE["a"] | {"shape": ["2"]}}, bytes(8)),
        safetensors_bytes({"a": ONE["a"] | {"dtype": "F4"}}, bytes(8)),
        safetensors_bytes({"a": ONE["a"] | {"dtype": ["F32"]}}, bytes(8)),
        safetensors_bytes({"a": {"dtype": "F32"}}, bytes(8)),
    ],
    ids=[
        "empty",
        "no header length",
        "data cut off",
        "header cut off",
        "huge length",
        "broken JSON",
        "a list",
        "not text",
        "wrong size",
        "before the data",
        "half an offset",
        "negative shape",
        "text in shape",
        "unknown dtype",
        "list as dtype",
        "no shape",
    ],
)
def test_a_damaged_safetensors_file_is_refused_in_one_line_before_it_is_read(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_safetensors_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        open_safetensors(tmp_path / "model.safetensors")


# Whole files and folders.


@pytest.mark.parametrize("there_before", [False, True])
def test_a_file_appears_whole_or_not_at_all(tmp_path, there_before):
    path = tmp_path / "file"
    if there_before:
        path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"half")
        file.flush()
        assert path.exists() == there_before  # not even while it is being written
        raise ZeroDivisionError
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"] * there_before
    with whole_file(path) as file:
        file.write(b"whole")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"whole"]


@pytest.mark.parametrize("there_before", [False, True])
def test_a_folder_appears_whole_or_not_at_all(tmp_path, there_before):
    path = tmp_path / "deep" / "folder"
    path.parent.mkdir()
    if there_before:
        path.mkdir()
        (path / "old").touch()
    with pytest.raises(ZeroDivisionError), whole_folder(path) as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert [p.name for p in path.parent.rglob("*")] == ["folder", "old"] * there_before
    with whole_folder(path) as folder:
        (folder / "whole").touch()
    assert [p.name for p in path.parent.rglob("*")] == ["folder", "whole"]


# Model folders.


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_gives_the_same_logits_when_loaded(tmp_path, tied):
    model = tiny_llama(torch.float32, tie_word_embeddings=tied)
    save_llama(model, tmp_path / "model", torch.float32)
    loaded = load_llama(tmp_path / "model", quantize=None)
    assert loaded.config == model.config
    close(loaded(TOKENS), model(TOKENS))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_a_config_that_was_written_names_the_architecture_and_dtype(tmp_path):
    save_llama(tiny_llama(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["torch_dtype"] == "bfloat16" and config["head_dim"] == 6
    tensors = open_safetensors(tmp_path / "model" / "model.safetensors")
    assert {lazy.dtype for lazy in tensors.values()} == {torch.bfloat16}


def test_a_tied_head_is_stored_once_as_the_embedding(tmp_path):
    model = tiny_llama(torch.float32, num_hidden_layers=1, tie_word_embeddings=True)
    save_llama(model, tmp_path / "model", torch.float32)
    tensors = open_safetensors(tmp_path / "model" / "model.safetensors")
    linear = [f"self_attn.{letter}_proj" for letter in "qkvo"]
    linear += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    block = [*linear, "input_layernorm", "post_attention_layernorm"]
    names = ["model.embed_tokens", *(f"model.layers.0.{name}" for name in block), "model.norm"]
    assert sorted(tensors) == sorted(f"{name}.weight" for name in names)  # and no lm_head.weight
    close(tensors["model.embed_tokens.weight"].read(), model.lm_head.weight.detach())


def test_shards_hold_each_tensor_once_and_load_as_one_file_does(tmp_path, monkeypatch):
    model = tiny_llama(torch.float32)
    largest = max(4 * p.numel() for p in model.parameters())
    monkeypatch.setattr(huggingface, "SHARD_BYTES", largest)
    save_llama(model, tmp_path / "model", torch.float32)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) >= 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    names = [name for file in files for name in open_safetensors(file)]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    for file in files:
        assert file.stat().st_size < largest + 4096  # the header comes on top
        for name in open_safetensors(file):
            assert index["weight_map"][name] == file.name
    close(load_llama(tmp_path / "model", quantize=None)(TOKENS), model(TOKENS))
    files[1].unlink()
    with pytest.raises(InputError, match=files[1].name):
        load_llama(tmp_path / "model")


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_bin_files_are_read_too(tmp_path, shards):
    model = tiny_llama(torch.float32)
    folder = tmp_path / "model"
    save_llama(model, folder, torch.float32)
    (folder / "model.safetensors").unlink()
    tensors = list(model.state_dict().items())
    if shards == 1:
        torch.save(dict(tensors), folder / "pytorch_model.bin")
    else:
        parts = [tensors[:5], tensors[5:]]
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for part, name in zip(parts, names, strict=True):
            torch.save(dict(part), folder / name)
        weight_map = {k: n for part, n in zip(parts, names, strict=True) for k, _ in part}
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    close(load_llama(folder, quantize=None)(TOKENS), model(TOKENS))


class Touch:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, name, zipped):
    mark, trap = tmp_path / "executed", {"model.norm.weight": Touch(tmp_path / "executed")}
    pickle.loads(pickle.dumps(trap))
    assert mark.exists()  # the trap works
    mark.unlink()
    folder = tmp_path / "model"
    save_llama(tiny_llama(), folder)
    (folder / "model.safetensors").unlink()
    if name.startswith("consolidated"):
        (folder / "config.json").unlink()
        (folder / "params.json").write_text("{}")
    torch.save(trap, folder / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError) as caught:
        load_llama(folder)
    assert not mark.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "missing"),
        ("model.norm.weight", None, "missing"),
        ("lm_head.weight", None, "missing"),
        ("model.layers.2.mlp.up_proj.weight", torch.zeros(24, 16), "not part of this Llama"),
        ("model.layers.0.self_attn.q_proj.bias", torch.zeros(24), "not part of this Llama"),
        ("model.layers.0.self_attn.q_proj.weight", torch.zeros(16, 24), "shape [16, 24]"),
    ],
)
def test_a_missing_extra_or_misshapen_tensor_is_named(tmp_path, name, change, said, quantize):
    folder = write_model(tiny_llama(torch.float32), tmp_path / "model", **{name: change})
    with pytest.raises(InputError) as caught:
        load_llama(folder, quantize=quantize)
    assert name in str(caught.value) and said in str(caught.value)


def test_buffers_of_old_checkpoints_and_the_copy_of_a_tied_head_are_passed_over(tmp_path):
    model = tiny_llama(torch.float32, tie_word_embeddings=True)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}
    extra["lm_head.weight"] = model.lm_head.weight.detach()
    loaded = load_llama(write_model(model, tmp_path / "model", **extra), quantize=None)
    close(loaded(TOKENS), model(TOKENS))


def test_what_is_no_model_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        load_llama(tmp_path / "nothing")
    with pytest.raises(InputError, match="config.json"):
        load_llama(tmp_path)
    save_llama(tiny_llama(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no model.safetensors"):
        load_llama(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match="model_type = 'gpt2'"):
        load_llama(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match="config.json: not a JSON file"):
        load_llama(tmp_path / "model")


def test_loading_in_4_bits_equals_quantizing_the_loaded_model(tmp_path):
    model = tiny_llama(torch.float32)
    save_llama(model, tmp_path / "model", torch.float32)
    loaded = load_llama(tmp_path / "model", quantize="nf4")
    assert {type(layer) for layer in linear_layers(loaded).values()} == {NF4Linear}
    names = {name for name, _ in loaded.named_parameters()}
    assert not {name for name in names if "proj" in name}  # no float weight of a linear layer
    close(loaded(TOKENS), quantize_model(model)(TOKENS))


def test_loading_in_4_bits_holds_one_float_weight_at_a_time(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_llama(tiny_llama(torch.float32, num_hidden_layers=4), folder, torch.float32)
    alive, most = weakref.WeakSet(), []

    def watch(path):
        tensors = open_safetensors(path)
        for name, lazy in tensors.items():
            if "proj" in name:
                tensors[name] = replace(lazy, read=watched(lazy.read))
        return tensors

    def watched(original):
        def read_one():
            tensor = original()
            alive.add(tensor)
            most.append(len(alive))
            return tensor

        return read_one

    monkeypatch.setattr(huggingface, "open_safetensors", watch)
    load_llama(folder, quantize="nf4")
    # 28 linear layers; the previous one may still be named when the next one is read
    assert len(most) == 28 and max(most) <= 2


def test_nf4_is_made_from_the_dtype_of_the_file_whatever_the_model_computes_in(tmp_path):
    model = tiny_llama(torch.float16)
    save_llama(model, tmp_path / "model", torch.float16)
    loaded = load_llama(tmp_path / "model", dtype=torch.bfloat16, quantize="nf4")
    differs = 0
    originals = linear_layers(model)
    assert originals.keys() == linear_layers(loaded).keys()
    for name, layer in linear_layers(loaded).items():
        original = originals[name]
        own = quantize_nf4(original.weight)
        close(layer.packed, own.packed)
        close(layer.absmax_codes, own.absmax_codes)
        assert dequantize_nf4(layer.quantized).dtype == torch.bfloat16
        other = quantize_nf4(original.weight.to(torch.bfloat16))
        differs += (layer.packed != other.packed).sum()
    assert differs > 0  # going through bfloat16 would have changed some nibbles
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16


def adapted(quantize=True, sft="q_proj,v_proj", dpo="q_proj,v_proj", dtype=torch.float32):
    """A tiny base with two trained adapters of different ranks and scales."""
    model = tiny_llama(dtype)
    if quantize:
        quantize_model(model)
    add_adapter(model, "sft", r=2, alpha=8, targets=sft)
    fill_adapter(model, "sft", seed=3)
    add_adapter(model, "dpo", r=3, alpha=4.5, targets=dpo)
    fill_adapter(model, "dpo", seed=4)
    return model


@pytest.mark.parametrize("quantize", [False, True])
def test_a_merged_folder_gives_the_logits_of_base_and_adapters(tmp_path, quantize):
    model = adapted(quantize)
    save_llama(model, tmp_path / "merged", torch.float32)
    loaded = load_llama(tmp_path / "merged", quantize=None)
    close(loaded(TOKENS), model(TOKENS), 1e-5)
    with active_adapters(model, ["sft"]):
        assert (loaded(TOKENS) - model(TOKENS)).abs().max() > 0.01
        save_llama(model, tmp_path / "sft", torch.float32)  # the active adapters only
        close(load_llama(tmp_path / "sft", quantize=None)(TOKENS), model(TOKENS), 1e-5)
    assert lora_layers(model)  # and the model itself is left as it was


def test_tokenizer_files_go_along_with_a_saved_model(tmp_path, model_folder):
    source = tmp_path / "source"
    shutil.copytree(model_folder, source)
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    save_llama(tiny_llama(), tmp_path / "model", tokenizer_from=source)
    for name in ("tokenizer.model", "generation_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == 32


@pytest.mark.parametrize(
    "ids",
    [{"eos_token_id": [5, 6]}, {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 0}, {}],
    ids=["two ends", "all three", "none"],
)
def test_the_special_ids_go_along_with_a_saved_model_as_they_are_and_nothing_else(
    tmp_path, model_folder, ids
):
    # transformers stops at any of Llama 3's several ends, and looks for them in this file.
    source = tmp_path / "source"
    shutil.copytree(model_folder, source)
    edit_json(source / "config.json", **ids, rope_theta=7.0)
    save_llama(tiny_llama(), tmp_path / "model", tokenizer_from=source)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {name: value for name, value in config.items() if name.endswith("_token_id")} == ids
    assert (config["rope_theta"], config["vocab_size"]) == (10000.0, 32)  # the model's own


# Adapter folders.


def same_base(model):
    """A second model with the base of `adapted` and no adapters."""
    return quantize_model(tiny_llama(torch.float32))


def test_an_adapter_comes_back_from_its_folder(tmp_path):
    model = adapted()
    save_adapter(model, ["sft"], tmp_path / "sft")
    other = same_base(model)
    load_adapter(other, tmp_path / "sft", "sft")
    with active_adapters(model, ["sft"]):
        close(other(TOKENS), model(TOKENS), 1e-5)
    adapter = next(iter(lora_layers(other).values())).adapters["sft"]
    assert adapter.lora_A.shape[0] == 2 and adapter.scale == 1
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        f"model.layers.{i}.self_attn.{m}.adapters.sft.lora_{x}"
        for i in range(2)
        for m in ("q_proj", "v_proj")
        for x in "AB"
    ]


def test_two_stacked_adapters_are_one_of_the_sum_of_their_ranks(tmp_path):
    model = adapted()
    save_adapter(model, ["sft", "dpo"], tmp_path / "both", "the/base")
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["r"] == 5 and config["lora_alpha"] == 5
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["base_model_name_or_path"] == "the/base"
    tensors = open_safetensors(tmp_path / "both" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.v_proj.lora_"
    layer = lora_layers(model)["model.layers.1.self_attn.v_proj"]
    B, A = tensors[f"{prefix}B.weight"].read(), tensors[f"{prefix}A.weight"].read()
    assert A.shape == (5, 16) and B.shape == (12, 5)
    sft, dpo = layer.adapters["sft"], layer.adapters["dpo"]
    by_hand = 4 * sft.lora_B @ sft.lora_A + 1.5 * dpo.lora_B @ dpo.lora_A  # alpha / r
    close(B @ A, by_hand.detach(), 1e-6)
    other = same_base(model)
    load_adapter(other, tmp_path / "both", "one")
    close(other(TOKENS), model(TOKENS), 1e-5)


@pytest.mark.parametrize(
    ("sft", "dpo"), [("q_proj,v_proj", "all"), ("all", "o_proj"), ("q_proj", "up_proj")]
)
def test_adapters_on_different_layers_are_saved_together_and_alone(tmp_path, sft, dpo):
    model = adapted(sft=sft, dpo=dpo)
    for names in (["sft", "dpo"], ["sft"], ["dpo"]):
        folder = tmp_path / "-".join(names)
        save_adapter(model, names, folder)
        other = same_base(model)
        load_adapter(other, folder, "one")
        with active_adapters(model, names):
            close(other(TOKENS), model(TOKENS), 1e-5)


def edit_json(path, **changes):
    """Change some values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("peft_type", "LOHA"),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_named(tmp_path, key, value):
    model = adapted()
    save_adapter(model, ["sft"], tmp_path / "sft")
    edit_json(tmp_path / "sft" / "adapter_config.json", **{key: value})
    with pytest.raises(InputError, match=f"{key} = "):
        load_adapter(same_base(model), tmp_path / "sft", "sft")


def test_settings_that_peft_writes_and_that_mean_nothing_here_are_accepted(tmp_path):
    model = adapted()
    save_adapter(model, ["sft"], tmp_path / "sft")
    noise = {"rank_pattern": {}, "modules_to_save": None, "revision": None, "use_dora": False}
    edit_json(tmp_path / "sft" / "adapter_config.json", **noise, inference_mode=False, eva=None)
    load_adapter(same_base(model), tmp_path / "sft", "sft")


def test_the_alpha_of_a_foreign_adapter_scales_its_update(tmp_path):
    # Ours have alpha = r, so that only a folder from elsewhere shows what the two numbers do.
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 7, "target_modules": ["v_proj"]}
    config["layers_to_transform"] = [1]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = "model.layers.1.self_attn.v_proj"
    A, B = torch.zeros(2, 16), torch.zeros(12, 2)
    A[:, 3] = torch.tensor([1.0, 2.0])
    B[5] = torch.tensor([10.0, 100.0])
    tensors = {f"base_model.model.{path}.lora_{x}.weight": t for x, t in (("A", A), ("B", B))}
    shapes = {name: t.shape for name, t in tensors.items()}
    file = tmp_path / "adapter_model.safetensors"
    write_safetensors(file, shapes, torch.float32, tensors.__getitem__)
    model = quantize_model(tiny_llama(torch.float32))
    load_adapter(model, tmp_path, "sft")
    layer = lora_layers(model)[path]
    one = torch.eye(16)[3]
    # Row 5 of B A is 10 * 1 + 100 * 2 = 210 in column 3, and alpha / r = 7 / 2.
    close(layer(one) - layer.base(one), 735 * torch.eye(12)[5], 1e-4)
    assert layer.adapters["sft"].delta()[5, 3] == 735


def test_an_adapter_of_another_model_or_rank_is_refused(tmp_path):
    model = adapted()
    save_adapter(model, ["sft"], tmp_path / "sft")
    wider = tiny_llama(torch.float32, hidden_size=20)
    with pytest.raises(InputError, match="shape"):
        load_adapter(wider, tmp_path / "sft", "sft")
    with pytest.raises(InputError, match="layers.1"):
        load_adapter(tiny_llama(torch.float32, num_hidden_layers=1), tmp_path / "sft", "sft")
    edit_json(tmp_path / "sft" / "adapter_config.json", r=3)
    with pytest.raises(InputError, match="lora_A is of shape"):
        load_adapter(same_base(model), tmp_path / "sft", "sft")
    with pytest.raises(InputError, match="adapter_config.json"):
        load_adapter(same_base(model), tmp_path, "sft")


def test_an_adapter_config_without_a_rank_is_refused(tmp_path):
    model = adapted()
    save_adapter(model, ["sft"], tmp_path / "sft")
    path = tmp_path / "sft" / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["r"]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="r"):
        load_adapter(same_base(model), tmp_path / "sft", "sft")


# Meta's layout.

META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}


def to_interleaved(weight, K):
    """Rows of each head as Meta orders them, one by one: plane i is rows 2i and 2i + 1."""
    rows = []
    for start in range(0, len(weight), K):
        for i in range(K // 2):
            rows += [weight[start + i], weight[start + K // 2 + i]]
    return torch.stack(rows)


def meta_folder(model, folder, files=1, embedding_axis=1):
    """A model as Meta would have published it, over one file or several."""
    c = model.config
    folder.mkdir()
    parts = [{} for _ in range(files)]
    for name, tensor in model.named_parameters():
        for ours, meta in META_NAMES.items():
            if ours in name:
                meta_name = name.replace(ours, meta).removeprefix("model.")
                break
        tensor = tensor.detach()
        if meta_name.split(".")[-2] in ("wq", "wk"):
            tensor = to_interleaved(tensor, c.head_dim)
        axis = {"wo": 1, "w2": 1, "tok_embeddings": embedding_axis}.get(meta_name.split(".")[-2], 0)
        slices = [tensor] * files if tensor.dim() == 1 else tensor.chunk(files, dim=axis)
        for part, piece in zip(parts, slices, strict=True):
            part[meta_name] = piece.clone()
    for i, part in enumerate(parts):
        part["rope.freqs"] = torch.zeros(c.head_dim // 2)
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    params = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "norm_eps": c.rms_norm_eps}
    params |= {"n_heads": c.num_attention_heads, "vocab_size": -1, "multiple_of": 256}
    params["n_kv_heads"] = c.num_key_value_heads
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize(("files", "axis"), [(1, 0), (2, 1), (2, 0)])
@pytest.mark.parametrize("groups", [2, 4])
def test_a_folder_in_metas_layout_gives_the_same_logits(tmp_path, files, axis, groups):
    # 2 files: as 13B. Llama 2 cuts the embedding by width (axis 1), Llama 3 by vocabulary.
    model = tiny_llama(torch.float32, head_dim=4, num_key_value_heads=groups)
    folder = meta_folder(model, tmp_path / "meta", files, axis)
    loaded = load_llama(folder, quantize=None)
    assert loaded.config.num_key_value_heads == groups
    close(loaded(TOKENS), model(TOKENS), 1e-5)


@pytest.mark.parametrize("files", [1, 2])
def test_metas_layout_loads_in_4_bits_as_the_plain_layout_does(tmp_path, files):
    model = tiny_llama(torch.float32, head_dim=4)
    save_llama(model, tmp_path / "plain", torch.float32)
    plain = load_llama(tmp_path / "plain")
    loaded = load_llama(meta_folder(model, tmp_path / "meta", files))
    close(loaded(TOKENS), plain(TOKENS))  # blocks run over the permuted weight


@pytest.mark.parametrize("damage", ["no file", "missing", "unknown", "params", "cut off"])
def test_a_damaged_folder_in_metas_layout_is_an_input_error_of_one_line(tmp_path, damage):
    folder = meta_folder(tiny_llama(torch.float32, head_dim=4), tmp_path / "meta")
    path = folder / "consolidated.00.pth"
    tensors = torch.load(path)
    if damage == "no file":
        path.unlink()
    elif damage == "missing":
        del tensors["layers.0.feed_forward.w1.weight"]
        torch.save(tensors, path)
    elif damage == "unknown":
        torch.save(tensors | {"layers.0.experts.weight": torch.zeros(1)}, path)
    elif damage == "params":
        (folder / "params.json").write_text('{"dim": 16}')
    else:
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError) as caught:
        load_llama(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


# Training state.


def test_a_state_brings_back_weights_adam_random_numbers_and_progress(tmp_path):
    model, path = adapted(), tmp_path / "state" / "dpo.pt"  # in a folder that is not there yet
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)

    def step():
        loss = (model(TOKENS) * torch.rand(32)).square().mean()  # needs the random state
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def values():
        return [p.detach().clone() for p in parameters]

    step()
    known = torch.tensor([[-1.0, -2.0], [torch.nan, torch.nan]])
    save_state(path, model, optimizer, {"training": known}, reached=(1, 14, (0, 3)))
    before = values()
    step()
    after = values()
    torch.manual_seed(99)
    for p in parameters:
        p.data.zero_()
    optimizer = torch.optim.AdamW(parameters, lr=0.5)
    table = torch.full((2, 2), 9.0)
    assert load_state(path, model, optimizer, {"training": table}) == (1, 14, (0, 3))
    assert table[0].tolist() == [-1, -2] and table[1].isnan().all()
    close(values(), before)
    step()
    close(values(), after)
    assert not any(map(torch.equal, before, after))


def test_a_state_holds_what_is_trained_and_no_frozen_weight(tmp_path):
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    save_state(tmp_path / "state.pt", model, optimizer, tables={}, reached=(0, 0, (0, 0)))
    layers = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(2) for m in "qv"]
    names = [f"{layer}.adapters.dpo.lora_{x}" for layer in layers for x in "AB"]
    saved = torch.load(io.BytesIO(read_sealed(tmp_path / "state.pt")))
    assert list(saved["trained"]) == names
