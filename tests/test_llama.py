"""The architecture against NumPy loops in float64, and config files, read or refused."""

import math

import numpy as np
import pytest
import torch
from helpers import SHAPE, fill_adapter, quantize_model, random_tokens, tiny_llama

from dpo_minimal import InputError, nf4
from dpo_minimal.extras.cache import Cache
from dpo_minimal.formats.huggingface import parse_config
from dpo_minimal.llama import (
    Attention,
    Llama,
    LlamaConfig,
    RMSNorm,
    inverse_frequencies,
    rotary_table,
    rotate,
)
from dpo_minimal.lora import add_adapter
from dpo_minimal.nf4 import NF4Linear, keep_weights

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
TINY_SCALING = LLAMA3_SCALING | {"original_max_position_embeddings": 512}

# The files as published, less nothing; the second value is the published number of parameters.
LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
TINYLLAMA = LLAMA_2_7B | {
    "_name_or_path": "",
    "attention_bias": False,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}


def numpy_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def numpy_frequencies(config):
    """Llama 3's scaling as its three cases, plane by plane (and none without it)."""
    K, scaling = config.head_dim, config.rope_scaling
    frequencies = [config.rope_theta ** (-2 * i / K) for i in range(K // 2)]
    if scaling is None:
        return frequencies
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    scaled = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency  # tokens per turn
        if wavelength < context / high:
            scaled.append(frequency)
        elif wavelength > context / low:
            scaled.append(frequency / scaling["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / scaling["factor"] + smooth * frequency)
    return scaled


def numpy_rotate(x, position, frequencies):
    """One head's vector x [K]: the plane (x_i, x_{i + K/2}) turns by position * frequency_i."""
    y, half = np.empty_like(x), len(x) // 2
    for i in range(half):
        cos, sin = math.cos(position * frequencies[i]), math.sin(position * frequencies[i])
        y[i] = x[i] * cos - x[i + half] * sin
        y[i + half] = x[i] * sin + x[i + half] * cos
    return y


def numpy_attention(x, weights, config):
    """x [T, D] -> [T, D]; query head h reads key/value head h // (H / G)."""
    K, H, G = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    frequencies, T = numpy_frequencies(config), len(x)
    q, k, v = (x @ weights[f"{name}_proj.weight"].T for name in "qkv")
    y = np.zeros((T, H * K))
    for h in range(H):
        g = h // (H // G)
        for t in range(T):
            query = numpy_rotate(q[t, h * K : (h + 1) * K], t, frequencies)
            scores = np.empty(t + 1)  # causal: the keys 0 to t
            for s in range(t + 1):
                key = numpy_rotate(k[s, g * K : (g + 1) * K], s, frequencies)
                scores[s] = query @ key / math.sqrt(K)
            chances = np.exp(scores - scores.max())
            chances /= chances.sum()
            y[t, h * K : (h + 1) * K] = chances @ v[: t + 1, g * K : (g + 1) * K]
    return y @ weights["o_proj.weight"].T


def numpy_weights(module, prefix=""):
    """The module's tensors whose names begin with the prefix, without it, in float64."""
    tensors = module.state_dict().items()
    return {
        name.removeprefix(prefix): tensor.double().numpy()
        for name, tensor in tensors
        if name.startswith(prefix)
    }


def numpy_llama(model, tokens):
    """Logits [T, V] for one row of tokens [T]."""
    config, weights = model.config, numpy_weights(model)
    eps = config.rms_norm_eps
    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config.num_hidden_layers):
        layer = numpy_weights(model, f"model.layers.{i}.")
        attention = numpy_weights(model, f"model.layers.{i}.self_attn.")
        x = x + numpy_attention(
            numpy_norm(x, layer["input_layernorm.weight"], eps), attention, config
        )
        y = numpy_norm(x, layer["post_attention_layernorm.weight"], eps)
        gate, up = y @ layer["mlp.gate_proj.weight"].T, y @ layer["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    return numpy_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def same(actual, expected, name=""):
    """Assert that two tensors are equal to the last bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=lambda t: f"{name} {t}")


def assert_close(actual, expected, tolerance=1e-10):
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else actual
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# The layers.


def test_rms_norm_equals_a_hand_computed_one():
    norm = RMSNorm(2, eps=12.5).double()
    norm.weight.data = torch.tensor([1.0, 2.0]).double()
    # mean(3^2, 4^2) = 12.5, and sqrt(12.5 + 12.5) = 5
    assert_close(norm(torch.tensor([3.0, 4.0]).double()), [0.6, 1.6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_in_16_bits_computes_in_float32(dtype):
    x = (100 * torch.randn(4, 256, generator=torch.Generator().manual_seed(0))).to(dtype)
    # In float16 the square of 300 is infinite; in bfloat16 the mean keeps two digits.
    expected = torch.from_numpy(numpy_norm(x.double().numpy(), 1.0, 1e-6)).to(dtype)
    same(RMSNorm(256, 1e-6).to(dtype)(x), expected)


def test_without_an_eps_of_its_own_a_config_norms_with_1e_6():
    given = {name: value for name, value in LLAMA_2_7B.items() if name != "rms_norm_eps"}
    assert (parse_config(given).rms_norm_eps, LlamaConfig(**SHAPE).rms_norm_eps) == (1e-6, 1e-6)
    # (1e-3, 1e-3, ...) has a mean square of 1e-6: the eps doubles it, and 1 / sqrt(2) is left.
    norm = Llama(LlamaConfig(**SHAPE)).model.norm.double()
    assert_close(norm(torch.full((16,), 1e-3, dtype=torch.float64)), np.full(16, 0.5**0.5))


def test_rotary_embedding_turns_halves_of_a_head_not_neighbours():
    config = LlamaConfig(**SHAPE)
    x = torch.randn(1, 1, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    positions = [0, 1, 2, 30, 400]
    y = rotate(x, *rotary_table(config, torch.tensor([positions]), torch.float64))
    for t, position in enumerate(positions):
        expected = numpy_rotate(x[0, 0, t].numpy(), position, numpy_frequencies(config))
        assert_close(y[0, 0, t], expected)


def test_rotary_table_of_a_bfloat16_model_is_float32():
    # In bfloat16 position 1,001 is 1,000. Here its angle in the fastest plane is 1,001 radians.
    model = tiny_llama(torch.bfloat16, num_hidden_layers=1)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda block, inputs: seen.extend(inputs[1:3]))
    model(torch.tensor([[3]]), positions=torch.tensor([[1001]]))
    assert_close(seen[0][0, 0, 0, 0], math.cos(1001), 1e-5)
    assert_close(seen[1][0, 0, 0, 0], math.sin(1001), 1e-5)


def test_llama_3_rope_scaling_equals_its_three_cases():
    config = parse_config(LLAMA_3_1_8B)
    expected, plain = numpy_frequencies(config), [500000.0 ** (-i / 64) for i in range(64)]
    kept = sum(e == p for e, p in zip(expected, plain, strict=True))
    slowed = sum(e == p / 8 for e, p in zip(expected, plain, strict=True))
    assert (kept, 64 - kept - slowed, slowed) == (29, 6, 29)  # all three cases occur
    assert_close(inverse_frequencies(config, torch.float64), expected)


@pytest.mark.parametrize("G", [1, 2, 4])
def test_key_value_heads_serve_neighbouring_query_heads(G):
    config = LlamaConfig(**SHAPE | {"num_key_value_heads": G})
    torch.manual_seed(0)
    attention = Attention(config).double()
    x = torch.randn(1, 7, 16).double()
    table = rotary_table(config, torch.arange(7)[None], torch.float64)
    expected = numpy_attention(x[0].numpy(), numpy_weights(attention), config)
    assert_close(attention(x, *table)[0], expected)


@pytest.mark.parametrize("scaling", [None, TINY_SCALING])
def test_logits_equal_a_numpy_llama_in_loops(scaling):
    model = tiny_llama(rope_scaling=scaling)
    tokens = random_tokens(2, 9)
    logits = model(tokens)
    for b in range(2):
        assert_close(logits[b], numpy_llama(model, tokens[b].numpy()))


# The whole model.


def test_a_tied_head_is_the_embedding_also_after_a_cast():
    model = tiny_llama(torch.bfloat16, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = tiny_llama()
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


def test_the_tied_head_learns_from_both_of_its_uses():
    model = tiny_llama(tie_word_embeddings=True)
    model(torch.tensor([[3]]))[0, 0, 4].backward()
    rows = model.model.embed_tokens.weight.grad.abs().sum(1).nonzero().flatten()
    assert rows.tolist() == [3, 4]  # read as an input, scored as an output


def test_right_padding_changes_nothing():
    model, tokens = tiny_llama(), random_tokens(2, 6)
    padded = torch.cat((tokens, random_tokens(2, 50, seed=9)), dim=1)
    assert_close(model(padded)[:, :6], model(tokens))


def test_the_key_value_cache_gives_the_logits_of_a_full_forward():
    model, tokens = tiny_llama(), random_tokens(2, 8)
    cache = [Cache() for _ in model.model.layers]
    steps = [model(tokens[:, :3], cache=cache)]  # a prompt, then one token per call
    for t in range(3, 8):
        steps.append(model(tokens[:, t : t + 1], torch.tensor([[t]]), cache=cache))
    assert_close(torch.cat(steps, dim=1), model(tokens))


def test_packed_rows_equal_separate_rows():
    model, first, second = tiny_llama(), random_tokens(1, 4), random_tokens(1, 5, seed=3)
    mask = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    mask[..., :4, :4] = torch.ones(4, 4).tril()  # block-diagonal, each block causal
    mask[..., 4:, 4:] = torch.ones(5, 5).tril()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(torch.cat((first, second), dim=1), positions, mask)
    assert_close(packed, torch.cat((model(first), model(second)), dim=1))


@pytest.mark.parametrize("dropout", [0.0, 0.5])  # recomputing must draw the same dropout again
def test_gradient_checkpointing_over_a_frozen_base_keeps_the_adapters_gradients(dropout):
    def gradients(checkpointing):
        model = tiny_llama(torch.float32)
        add_adapter(model, "dpo", r=2, dropout=dropout, targets="all")
        fill_adapter(model, "dpo")
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        model.hidden(random_tokens(2, 5)).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    without, with_it = gradients(False), gradients(True)
    assert len(without) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    for name, gradient in with_it.items():
        assert gradient is not None and gradient.any(), name
        same(gradient, without[name], name)


def test_gradient_checkpointing_computes_each_block_twice():
    model, calls = tiny_llama(), []
    model.gradient_checkpointing = True
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.hidden(random_tokens(1, 4)).sum().backward()
    assert len(calls) == 2 * 2


def test_checkpointing_over_nf4_dequantizes_once_for_recomputation_and_backward(monkeypatch):
    def quantized():
        model = quantize_model(tiny_llama(torch.float32))
        add_adapter(model, "dpo", r=2, targets="all")
        fill_adapter(model, "dpo")
        return model

    calls, dequantize = [], nf4.dequantize_nf4
    monkeypatch.setattr(nf4, "dequantize_nf4", lambda q: calls.append(q) or dequantize(q))

    def gradients(model):
        """(how often a weight was dequantized, the gradients of a step)."""
        calls.clear()
        model.zero_grad()
        model.hidden(random_tokens(2, 5)).square().sum().backward()
        named = model.named_parameters()
        return len(calls), {name: p.grad for name, p in named if p.requires_grad}

    model, other = quantized(), quantized()
    count, expected = gradients(model)
    # Seven layers in two blocks, forward and backward; but nothing below the first adapters'
    # sums needs a gradient, so that q, k and v of the first block are read in forward only.
    assert count == 2 * 14 - 3
    model.gradient_checkpointing = True
    keep_weights(model, True)  # as train.py does
    kept, with_it = gradients(model)
    assert kept == 2 * 14
    layers = [layer for layer in other.modules() if isinstance(layer, NF4Linear)]
    assert [layer.keep_weight for layer in layers] == [False] * 14  # that was of one model only
    keep_weights(model, False)
    assert gradients(model)[0] == 3 * 14 - 3  # unless they are kept, once for each of the three
    model.gradient_checkpointing = False
    assert gradients(model)[0] == count
    for name, gradient in with_it.items():
        same(gradient, expected[name], name)


# Config files.


@pytest.mark.parametrize(
    "published, parameters",
    [
        (LLAMA_2_7B, 6_738_415_616),
        (TINYLLAMA, 1_100_048_384),
        (SMOLLM2_135M, 134_515_008),
        (LLAMA_3_1_8B, 8_030_261_248),
    ],
)
def test_published_configs_give_models_of_the_published_size(published, parameters):
    with torch.device("meta"):
        model = Llama(parse_config(published))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_published_config_is_read_field_by_field():
    config = parse_config(LLAMA_3_1_8B)
    assert (config.head_dim, config.num_key_value_heads, config.vocab_size) == (128, 8, 128256)
    assert (config.rope_theta, config.rms_norm_eps) == (500000.0, 1e-5)
    assert config.rope_scaling == LLAMA3_SCALING
    llama_2 = parse_config(LLAMA_2_7B)  # its file has no rope_theta
    assert (llama_2.rope_theta, llama_2.rope_scaling) == (10000.0, None)
    assert (llama_2.tie_word_embeddings, llama_2.max_position_embeddings) == (False, 4096)


def test_transformers_5_rope_parameters_mean_the_same_as_the_older_keys():
    for published in (LLAMA_3_1_8B, SMOLLM2_135M):
        newer = dict(published)
        rope = newer.pop("rope_scaling") or {"rope_type": "default"}
        newer["rope_parameters"] = rope | {"rope_theta": newer.pop("rope_theta")}
        newer["dtype"] = newer.pop("torch_dtype")
        assert parse_config(newer) == parse_config(published)


def test_the_older_name_of_the_rope_type_is_read_too():
    scaling = {"type" if key == "rope_type" else key: v for key, v in LLAMA3_SCALING.items()}
    older = parse_config(LLAMA_3_1_8B | {"rope_scaling": scaling})
    assert older == parse_config(LLAMA_3_1_8B)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "gemma"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("sliding_window", 4096),
        ("num_local_experts", 8),
        ("rope_interleaved", True),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),  # lacks the other three
        ("quantization_config", {"load_in_4bit": True}),
    ],
)
def test_what_a_config_asks_for_and_is_not_implemented_is_named(key, value):
    with pytest.raises(InputError) as error:
        parse_config(LLAMA_2_7B | {key: value})
    assert key in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "vocab_size", "num_hidden_layers"])
def test_what_a_config_lacks_is_named(key):
    with pytest.raises(InputError, match=key):
        parse_config({name: v for name, v in LLAMA_2_7B.items() if name != key})


def test_heads_that_do_not_divide_into_key_value_heads_are_refused():
    with pytest.raises(InputError, match="32 heads.* 5 key/value heads"):
        parse_config(LLAMA_2_7B | {"num_key_value_heads": 5})


def test_a_config_without_key_value_heads_or_head_dim_is_plain_multi_head():
    config = parse_config(LLAMA_2_7B | {"num_key_value_heads": None})
    assert (config.num_key_value_heads, config.head_dim) == (32, 128)


def test_tensors_carry_the_hugging_face_names():
    names = set(tiny_llama(num_hidden_layers=1).state_dict())
    layer = "model.layers.0."
    assert names == {
        "model.embed_tokens.weight",
        *(f"{layer}self_attn.{letter}_proj.weight" for letter in "qkvo"),
        *(f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        f"{layer}input_layernorm.weight",
        f"{layer}post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
