"""Adapters: the update, the reference by switching off, dropout, freezing and merging."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import fill_adapter, merge_adapters, quantize_model, random_tokens, tiny_llama
from torch import nn

from dpo_minimal import InputError
from dpo_minimal.lora import (
    Adapter,
    LoRALinear,
    active_adapters,
    add_adapter,
    linear_layers,
    lora_layers,
    merged_weight,
)
from dpo_minimal.loss import dpo_loss, sequence_logps
from dpo_minimal.nf4 import NF4Linear, dequantize_nf4

same = partial(torch.testing.assert_close, rtol=0, atol=0)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = random_tokens(2, 6)


def sft_model(dtype=torch.float32, dropout=0.0, quantize=True):
    """A tiny base with a trained adapter `sft`, and beside it a new one, `dpo`."""
    model = tiny_llama(dtype)
    if quantize:
        quantize_model(model)
    add_adapter(model, "sft", r=2, alpha=4, dropout=dropout, targets="all")
    fill_adapter(model, "sft")
    add_adapter(model, "dpo", r=4, alpha=4, dropout=dropout, targets="all")
    return model


def frozen_state(model):
    """Copies of every tensor of the model but those of the adapter `dpo`."""
    return {name: t.clone() for name, t in model.state_dict().items() if ".dpo." not in name}


# The update.


def test_the_update_is_alpha_over_r_times_b_a_x():
    layer = LoRALinear(nn.Linear(2, 2, bias=False))
    layer.base.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layer.adapters["sft"] = adapter = Adapter(2, 2, r=2, alpha=8, dropout=0.0)
    layer.active = ("sft",)
    adapter.lora_A.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    adapter.lora_B.data = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    # x = (1, 2): W x = (5, 11); A x = (1, 3); B A x = (7, 3); alpha / r = 4
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [5 + 28, 11 + 12]
    assert adapter.delta().tolist() == [[12, 8], [4, 4]]


def test_a_new_adapter_changes_nothing_and_only_b_has_a_gradient():
    model = quantize_model(tiny_llama(torch.float32))
    base = model(TOKENS)
    add_adapter(model, "sft", r=2, targets="all")
    logits = model(TOKENS)
    same(logits, base)
    logits.square().sum().backward()
    for name, layer in lora_layers(model).items():
        adapter = layer.adapters["sft"]
        assert not adapter.lora_A.grad.any(), name  # B = 0 blocks it
        assert adapter.lora_B.grad.any(), name  # were A = 0 as well, nothing would ever learn


def test_a_is_uniform_within_one_over_the_root_of_in_features():
    torch.manual_seed(0)
    A = Adapter(400, 8, r=16, alpha=16, dropout=0.0).lora_A
    assert 0.049 < A.max() <= 0.05 and -0.05 <= A.min() < -0.049
    assert A.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)


def test_two_stacked_adapters_add_up():
    model = sft_model(quantize=False)
    fill_adapter(model, "dpo", seed=3)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    W = layer.base.weight.double()
    for name, scale in (("sft", 4 / 2), ("dpo", 4 / 4)):
        adapter = layer.adapters[name]
        W = W + scale * adapter.lora_B.double() @ adapter.lora_A.double()
    close(layer(x).double(), x.double() @ W.T)


# What is adapted, what is frozen.


def test_all_means_every_linear_layer_but_the_head():
    model = tiny_llama(num_hidden_layers=1)
    add_adapter(model, "sft", targets="all")
    assert [name.split(".")[-1] for name in lora_layers(model)] == LINEAR
    assert isinstance(model.lm_head, nn.Linear)


def test_the_linear_layers_are_found_by_their_full_names_also_under_adapters():
    model = quantize_model(tiny_llama())
    under = {**dict.fromkeys(LINEAR[:4], "self_attn"), **dict.fromkeys(LINEAR[4:], "mlp")}
    names = [f"model.layers.{i}.{under[name]}.{name}" for i in range(2) for name in LINEAR]
    kinds = {name: type(layer) for name, layer in linear_layers(model).items()}
    assert kinds == dict.fromkeys(names, NF4Linear) and list(kinds) == names
    add_adapter(model, "sft", targets="v_proj")
    kinds = {name: type(layer) for name, layer in linear_layers(model).items()}
    adapted = {name: LoRALinear if "v_proj" in name else NF4Linear for name in names}
    assert kinds == adapted and list(kinds) == names  # and no base of an adapted layer


def test_targets_are_last_names_or_full_names():
    model = tiny_llama()
    add_adapter(model, "sft", targets="v_proj,model.layers.1.mlp.up_proj")
    v = "self_attn.v_proj"
    expected = [f"model.layers.0.{v}", f"model.layers.1.{v}", "model.layers.1.mlp.up_proj"]
    assert list(lora_layers(model)) == expected


def test_an_unknown_target_is_named_and_the_model_stays_as_it_was():
    model = tiny_llama()
    with pytest.raises(InputError, match="c_attn.*q_proj, k_proj, v_proj"):
        add_adapter(model, "sft", targets="q_proj,c_attn")
    assert not lora_layers(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == []
    with pytest.raises(InputError, match="lm_head"):
        add_adapter(model, "sft", targets="lm_head")


def test_only_the_newest_adapter_can_be_trained():
    model = sft_model()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = lora_layers(model)
    assert trained == {f"{name}.adapters.dpo.lora_{m}" for name in layers for m in "AB"}


def test_an_adapter_has_its_own_rank_and_scale():
    adapters = sft_model().model.layers[0].self_attn.k_proj.adapters
    assert [tuple(a.lora_A.shape) for a in adapters.values()] == [(2, 16), (4, 16)]
    assert [tuple(a.lora_B.shape) for a in adapters.values()] == [(12, 2), (12, 4)]
    assert [a.scale for a in adapters.values()] == [2.0, 1.0]


def test_a_second_adapter_of_the_same_name_replaces_the_first_and_acts_once():
    model = tiny_llama(torch.float32)
    base = model(TOKENS)
    add_adapter(model, "sft", r=2, targets="all")
    fill_adapter(model, "sft")
    add_adapter(model, "sft", r=4, targets="all")
    same(model(TOKENS), base)  # the trained one is gone
    layer = model.model.layers[0].mlp.up_proj
    assert layer.active == ("sft",) and layer.adapters["sft"].lora_A.shape == (4, 16)


def test_adapters_of_a_bfloat16_model_are_float32_and_all_entries_move_at_1e_6():
    model = sft_model(torch.bfloat16)
    fill_adapter(model, "dpo")
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
    logits = model(TOKENS)
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    optimizer.step()
    stuck = [(p == old) & (p.grad != 0) for p, old in zip(trained, before, strict=True)]
    assert [int(s.sum()) for s in stuck] == [0] * len(stuck)  # of bfloat16 entries 97% would be


# The reference.


def test_the_reference_is_base_plus_sft_and_not_the_base():
    model = tiny_llama(torch.float32)
    base = model(TOKENS)
    add_adapter(model, "sft", r=2, targets="all")
    fill_adapter(model, "sft")
    sft = model(TOKENS)
    add_adapter(model, "dpo", r=2, targets="all")
    fill_adapter(model, "dpo", seed=3)
    policy = model(TOKENS)
    with active_adapters(model, ["sft"]):
        same(model(TOKENS), sft)
    with active_adapters(model, []):
        same(model(TOKENS), base)
    same(model(TOKENS), policy)
    differences = [(base - sft).abs().max(), (sft - policy).abs().max()]
    assert min(differences) > 0.01


def test_adapters_return_after_an_exception_and_from_nesting():
    model = sft_model()

    def active():
        return {layer.active for layer in lora_layers(model).values()}

    with pytest.raises(KeyError), active_adapters(model, ["sft"]):
        with active_adapters(model, []):
            assert active() == {()}
        assert active() == {("sft",)}
        raise KeyError
    assert active() == {("sft", "dpo")}


def test_a_layer_without_the_named_adapter_acts_as_its_base():
    model = tiny_llama(torch.float32)
    add_adapter(model, "sft", targets="q_proj")
    add_adapter(model, "dpo", targets="q_proj,v_proj")
    with active_adapters(model, ["sft"]):
        attention = model.model.layers[0].self_attn
        assert (attention.q_proj.active, attention.v_proj.active) == (("sft",), ())


def test_two_reference_passes_of_a_model_in_training_mode_are_equal():
    model = sft_model(dropout=0.5).train()  # dropout must not act on the frozen adapter
    with active_adapters(model, ["sft"]):
        same(model(TOKENS), model(TOKENS))


def test_dropout_acts_on_the_trainable_adapter_in_training_only():
    model = sft_model(dropout=0.5)
    fill_adapter(model, "dpo")
    assert not torch.equal(model.train()(TOKENS), model(TOKENS))
    same(model.eval()(TOKENS), model(TOKENS))


def test_dropout_drops_inputs_and_keeps_their_mean():
    torch.manual_seed(0)
    adapter = Adapter(2000, 1, r=1, alpha=1, dropout=0.25)
    adapter.lora_A.data.fill_(1.0)
    adapter.lora_B.data.fill_(1.0)
    kept = adapter(torch.ones(2000)).item() * 0.75  # a kept input counts 1 / (1 - 0.25)
    assert kept == pytest.approx(round(kept), abs=1e-2)
    assert abs(kept - 1500) < 5 * (2000 * 0.25 * 0.75) ** 0.5  # five standard deviations


def test_a_dpo_step_moves_the_margin_and_nothing_but_the_dpo_adapter():
    model = sft_model(dropout=0.1)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, 3:] = True

    def logps(names):
        with active_adapters(model, names):
            return sequence_logps(model, TOKENS, mask)

    reference, frozen = logps(["sft"]).detach(), frozen_state(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # the first step moves B only
        policy = logps(["sft", "dpo"])
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            *policy[:, None], *reference[:, None], 0.1
        )
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert (chosen_rewards - rejected_rewards).item() > 0  # of the second step: it has learned
    same(logps(["sft"]).detach(), reference)
    same(frozen_state(model), frozen)


# Merging.


@pytest.mark.parametrize("quantize", [False, True])
def test_merged_logits_equal_those_of_base_and_adapters(quantize):
    model = sft_model(quantize=quantize)
    fill_adapter(model, "dpo", seed=3)
    expected = model(TOKENS)
    merge_adapters(model)
    kinds = {type(module) for module in model.modules()}
    assert not kinds & {LoRALinear, NF4Linear, Adapter}  # in NF4 again the update would be gone
    close(model(TOKENS), expected)


def test_a_merged_weight_is_the_dequantized_one_plus_the_update():
    model, original = sft_model(), tiny_llama(torch.float32)
    layer = model.model.layers[1].mlp.down_proj
    adapter = layer.adapters["sft"]
    W = dequantize_nf4(layer.base.quantized).double().numpy()
    update = (
        2.0 * adapter.lora_B.detach().double().numpy() @ adapter.lora_A.detach().double().numpy()
    )
    merge_adapters(model)
    merged = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_allclose(merged, W + update, rtol=1e-5, atol=1e-6)
    # The adapter was trained over the NF4 weight: the original one is off by its 9%.
    W_original = original.model.layers[1].mlp.down_proj.weight.detach().numpy()
    assert np.abs(merged - (W_original + update)).max() > 0.01


def test_only_active_adapters_are_merged():
    model = sft_model()
    fill_adapter(model, "dpo", seed=3)
    with active_adapters(model, ["sft"]):
        reference = model(TOKENS)
        merge_adapters(model)
    close(model(TOKENS), reference)


def test_merging_sums_in_float32_and_rounds_once_to_the_dtype_of_the_head():
    model = sft_model(torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    adapter = layer.adapters["sft"]
    W = dequantize_nf4(layer.base.quantized).float()
    expected = (W + 2.0 * (adapter.lora_B @ adapter.lora_A)).to(torch.bfloat16)
    assert merged_weight(layer).dtype == torch.float32
    merge_adapters(model)
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16
    same(merged, expected)
    wide = merge_adapters(sft_model(torch.bfloat16), torch.float32)  # unless one is asked for
    assert wide.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
