"""Adapters against PEFT: forward, gradients, merging, and folders read both ways."""

import json
import tempfile

import pytest
import torch
from helpers import fill_adapter, merge_adapters
from oracles import (
    NO_ORACLE,
    both_llamas,
    load_transformers,
    nf4_from_bitsandbytes,
    random_tokens,
    relative_difference,
    smollm2_folder,
    transformers_llama,
)

from dpo_minimal import InputError
from dpo_minimal.checkpoint import load_adapter, load_llama, save_adapter, save_llama
from dpo_minimal.lora import active_adapters, add_adapter, lora_layers
from dpo_minimal.nf4 import NF4Linear
from dpo_minimal.tokenizer import load_tokenizer

peft = pytest.importorskip("peft", reason=NO_ORACLE)
transformers = pytest.importorskip("transformers", reason=NO_ORACLE)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # theirs, about each other

CLOSE = 1e-5  # two layers in float32, as in test_transformers.py
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = random_tokens(3, 40)


def with_peft(model, r=4, alpha=10, targets=ALL, seed=3):
    """The model with a PEFT adapter whose B is random, as if it had been trained."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def copy_adapter(model, theirs, name="sft"):
    """Copy the weights of PEFT's adapter into our adapter of the same shapes."""
    for path, layer in lora_layers(model).items():
        expected = theirs.get_submodule(f"base_model.model.{path}")
        adapter = layer.adapters[name]
        adapter.lora_A.data.copy_(expected.lora_A["default"].weight)
        adapter.lora_B.data.copy_(expected.lora_B["default"].weight)


def assert_same_logits_and_adapter_gradients(ours, theirs):
    """Of a loss that weighs every logit differently; also that only adapters have gradients."""
    logits, expected = ours(TOKENS), theirs(TOKENS).logits
    assert relative_difference(logits, expected) < CLOSE
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    for path, layer in lora_layers(ours).items():
        adapter = layer.adapters["sft"]
        expected = theirs.get_submodule(f"base_model.model.{path}")
        A, B = expected.lora_A["default"].weight, expected.lora_B["default"].weight
        assert relative_difference(adapter.lora_A.grad, A.grad) < CLOSE, path
        assert relative_difference(adapter.lora_B.grad, B.grad) < CLOSE, path
    trained = {name for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert trained == {f"{path}.adapters.sft.lora_{x}" for path in lora_layers(ours) for x in "AB"}


# Layers.


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"]], ids=["all", "q_proj,v_proj"])
def test_logits_and_gradients_with_an_adapter_are_those_of_peft(tmp_path, targets):
    theirs, ours = both_llamas(tmp_path)
    theirs = with_peft(theirs, targets=targets)
    add_adapter(ours, "sft", r=4, alpha=10, targets=",".join(targets))
    assert len(lora_layers(ours)) == 2 * len(targets)
    copy_adapter(ours, theirs)
    assert_same_logits_and_adapter_gradients(ours, theirs)
    assert relative_difference(ours(TOKENS), load_llama(tmp_path, quantize=None)(TOKENS)) > 0.01


def test_logits_and_gradients_over_nf4_are_those_of_peft_over_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes", reason=NO_ORACLE)
    transformers_llama(tmp_path)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )
    theirs = load_transformers(tmp_path, quantization_config=settings, device_map="cpu").train()
    ours = load_llama(tmp_path)
    for path, layer in list(ours.named_modules()):
        if isinstance(layer, NF4Linear):  # some of their 8-bit codes are not the nearest: take all
            weight = theirs.get_submodule(path).weight
            quantized = nf4_from_bitsandbytes(weight.data, weight.quant_state)
            torch.testing.assert_close(layer.packed, quantized.packed)
            ours.set_submodule(path, NF4Linear(quantized))
    theirs = with_peft(theirs)
    add_adapter(ours, "sft", r=4, alpha=10, targets="all")
    copy_adapter(ours, theirs)
    assert_same_logits_and_adapter_gradients(ours, theirs)


def test_merging_gives_the_weights_that_peft_merges(tmp_path):
    theirs, ours = both_llamas(tmp_path)
    theirs = with_peft(theirs)
    add_adapter(ours, "sft", r=4, alpha=10, targets="all")
    copy_adapter(ours, theirs)
    before = ours.model.layers[1].mlp.up_proj.base.weight.clone()
    merged, expected = merge_adapters(ours), theirs.merge_and_unload()
    for path, parameter in expected.named_parameters():
        # One product of rank 4 and one sum: a few roundings.
        assert relative_difference(merged.get_parameter(path), parameter) < 1e-6, path
    assert relative_difference(merged.model.layers[1].mlp.up_proj.weight, before) > 0.01


def test_a_new_adapter_starts_as_one_of_peft_does(tmp_path):
    theirs, ours = both_llamas(tmp_path)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=64, target_modules=["down_proj"]))
    add_adapter(ours, "sft", r=64, targets="down_proj")
    expected = theirs.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    found = ours.model.layers[0].mlp.down_proj.adapters["sft"]
    A, B = expected.lora_A["default"].weight, expected.lora_B["default"].weight
    assert not B.any() and not found.lora_B.any()
    for statistic in (torch.max, torch.min, torch.std):  # of 64 x 128 uniform numbers
        ratio = statistic(found.lora_A) / statistic(A)
        assert ratio.item() == pytest.approx(1, abs=0.03)


# Folders.


def adapted_llama(folder, quantize):
    """Ours with two trained adapters of different rank, scale and targets, `dpo` on `sft`."""
    transformers_llama(folder)
    model = load_llama(folder, quantize=quantize)
    add_adapter(model, "sft", r=4, alpha=10, targets="all")
    add_adapter(model, "dpo", r=2, alpha=1, targets="q_proj,v_proj")
    fill_adapter(model, "sft", seed=7, size=0.1)
    fill_adapter(model, "dpo", seed=8, size=0.4)
    return model


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("names", [["sft"], ["sft", "dpo"], ["dpo"]], ids="+".join)
def test_peft_loads_our_adapters_over_the_dequantized_base(tmp_path, names, quantize):
    ours = adapted_llama(tmp_path / "original", quantize)
    with active_adapters(ours, []):
        save_llama(ours, tmp_path / "base", dtype=torch.float32)
    save_adapter(ours, names, tmp_path / "adapter", base_name="a base")
    theirs = peft.PeftModel.from_pretrained(
        load_transformers(tmp_path / "base"), tmp_path / "adapter"
    )
    assert theirs.peft_config["default"].base_model_name_or_path == "a base"
    with active_adapters(ours, names), torch.no_grad():
        logits = ours(TOKENS)
        assert (logits - theirs(TOKENS).logits).abs().max() < 1e-4
        assert relative_difference(logits, theirs(TOKENS).logits) < CLOSE
        with theirs.disable_adapter():
            assert relative_difference(logits, theirs(TOKENS).logits) > 0.01


@pytest.mark.parametrize("targets", [ALL, ["k_proj", "down_proj"]], ids=",".join)
def test_our_loader_reads_the_adapters_that_peft_writes(tmp_path, targets):
    theirs, ours = both_llamas(tmp_path / "base")
    theirs = with_peft(theirs, r=3, alpha=7, targets=targets)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter", "sft")
    assert_same_logits_and_adapter_gradients(ours, theirs)


def test_an_adapter_survives_the_way_to_peft_and_back(tmp_path):
    ours = adapted_llama(tmp_path / "base", "nf4")
    save_adapter(ours, ["sft", "dpo"], tmp_path / "ours")
    base = load_transformers(tmp_path / "base")
    peft.PeftModel.from_pretrained(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_llama(tmp_path / "base")
    load_adapter(again, tmp_path / "theirs", "both")
    # Two products or one of the stacked rank: the same sums in another order.
    assert relative_difference(again(TOKENS), ours(TOKENS)) < CLOSE


@pytest.mark.parametrize(
    "setting",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2}},
        {"alpha_pattern": {"v_proj": 32}},
        {"modules_to_save": ["embed_tokens"]},
        {"layers_to_transform": [1]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_what_peft_can_save_and_ours_cannot_read_is_refused_or_right(tmp_path, setting):
    theirs, ours = both_llamas(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], **setting)
    theirs = peft.get_peft_model(theirs, config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    try:
        load_adapter(ours, tmp_path / "adapter", "sft")
    except InputError as error:
        assert next(iter(setting)) in str(error)
    else:
        assert relative_difference(ours(TOKENS), theirs(TOKENS).logits) < CLOSE


def test_our_adapter_config_says_what_the_weights_are(tmp_path):
    save_adapter(adapted_llama(tmp_path / "base", "nf4"), ["sft", "dpo"], tmp_path / "adapter")
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.peft_type, config.task_type) == ("LORA", "CAUSAL_LM")
    assert config.r == config.lora_alpha == 4 + 2 and config.target_modules == set(ALL)
    known = set(peft.LoraConfig.__dataclass_fields__)
    assert set(json.loads((tmp_path / "adapter/adapter_config.json").read_text())) <= known


# The real checkpoint.


def test_peft_loads_our_adapter_over_the_real_checkpoint():
    source = smollm2_folder()
    ours = load_llama(source)
    add_adapter(ours, "sft", r=8, targets="all")
    add_adapter(ours, "dpo", r=4)
    for seed, name in enumerate(("sft", "dpo")):
        fill_adapter(ours, name, seed=seed, size=0.002)
    text = "Question: Why is the sky blue?\n\nAnswer: Because air scatters blue light the most."
    tokens = torch.tensor([load_tokenizer(source).encode(text, bos=True, eos=True)])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with active_adapters(ours, []):
            save_llama(ours, f"{folder}/base", dtype=torch.float32)
            without = ours(tokens)
        save_adapter(ours, ["sft", "dpo"], f"{folder}/adapter")
        theirs = load_transformers(f"{folder}/base")
        theirs = peft.PeftModel.from_pretrained(theirs, f"{folder}/adapter")
        logits, expected = ours(tokens), theirs(tokens).logits
    assert (logits - expected).abs().max() < 1e-4
    assert (logits - without).abs().max() > 0.1
