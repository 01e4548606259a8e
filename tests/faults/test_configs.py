"""Configs whose numbers make no sense are refused by name, before anything is made of them."""

import json

import pytest
from test_checkpoint import meta_folder

from dpo_minimal import InputError
from dpo_minimal.formats.huggingface import parse_config, read_config

GOOD = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WHOLE = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
]
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("value", ["256", [2], {}, 0, -1, 1.5, True, 10**12, float("nan")])
@pytest.mark.parametrize("key", WHOLE)
def test_a_size_that_is_no_whole_number_in_bounds_is_refused_by_name(key, value):
    with pytest.raises(InputError, match=f"^the config's {key} is .* not a whole number from 1"):
        parse_config(GOOD | {key: value})


@pytest.mark.parametrize("value", ["1e-6", [], -1, float("nan"), float("inf"), True, None])
def test_an_eps_that_is_no_number_in_bounds_is_refused(value):
    with pytest.raises(InputError, match="^the config's rms_norm_eps is .* not a number from 0"):
        parse_config(GOOD | {"rms_norm_eps": value})


@pytest.mark.parametrize("value", ["10000", [1], -1, 0.5, float("nan")])
def test_a_theta_that_is_no_number_in_bounds_is_refused(value):
    with pytest.raises(InputError, match="^the config's rope_theta is"):
        parse_config(GOOD | {"rope_theta": value})


@pytest.mark.parametrize("key", [key for key in ROPE if key != "rope_type"])
@pytest.mark.parametrize("value", ["8", None, -1, float("nan")])
def test_a_rope_scaling_that_is_no_number_in_bounds_is_refused(key, value):
    assert parse_config(GOOD | {"rope_scaling": ROPE}).rope_scaling == ROPE
    with pytest.raises(InputError, match=f"^the config's {key} is"):
        parse_config(GOOD | {"rope_scaling": ROPE | {key: value}})


@pytest.mark.parametrize("value", ["llama3", ["llama3"], 3])
def test_a_rope_scaling_that_is_no_object_is_refused(value):
    with pytest.raises(InputError, match="rope_scaling"):
        parse_config(GOOD | {"rope_scaling": value})


@pytest.mark.parametrize("value", ["true", 1, None])
def test_tied_is_true_or_false(value):
    with pytest.raises(InputError, match="tie_word_embeddings is .* not true or false"):
        parse_config(GOOD | {"tie_word_embeddings": value})


def test_null_says_nothing_where_it_may():
    silent = {"architectures": None, "hidden_act": None, "head_dim": None, "rope_scaling": None}
    assert parse_config(GOOD | silent) == parse_config(GOOD)


@pytest.mark.parametrize(
    ("key", "value"),
    [("dim", "16"), ("n_layers", None), ("n_layers", 10**9), ("n_heads", 0), ("norm_eps", -1)]
    + [("rope_theta", "x"), ("max_seq_len", 2.5)],
)
def test_a_params_json_with_such_a_number_is_refused(tmp_path, key, value):
    import torch
    from helpers import tiny_llama

    folder = meta_folder(tiny_llama(torch.float32, head_dim=4), tmp_path / "meta")
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {key: value}))
    with pytest.raises(InputError, match="the config's"):
        read_config(folder)


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000])
def test_a_params_json_that_is_no_object_is_refused(tmp_path, text):
    import torch
    from helpers import tiny_llama

    folder = meta_folder(tiny_llama(torch.float32, head_dim=4), tmp_path / "meta")
    (folder / "params.json").write_text(text)
    with pytest.raises(InputError, match="params.json"):
        read_config(folder)
