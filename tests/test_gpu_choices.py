"""What is decided because of a GPU: kernels, dtype, device, checkpointing. None is needed here."""

import argparse
import importlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_llama

from dpo_minimal.data import EncodedPair
from dpo_minimal.extras import compiled, machine, memory, preflight
from dpo_minimal.loop import Settings
from dpo_minimal.nf4 import DYNAMIC_CODE, NF4Linear, dequantize_nf4, on_device, quantize_nf4


@pytest.fixture
def card(monkeypatch):
    """A function that pretends a card of a compute capability; returns what it is told."""

    def pretend(capability):
        told = []
        for name, value in {
            "get_device_capability": lambda device: capability,
            "set_device": told.append,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", told.append)
        return told

    return pretend


def test_cards_before_ampere_get_float32_unless_a_flag_says_otherwise(card):
    card((7, 5))
    assert machine.device_and_dtype("cuda", None) == ("cuda", torch.float32)
    assert machine.device_and_dtype("cuda", "bfloat16") == ("cuda", torch.bfloat16)
    card((8, 0))
    assert machine.device_and_dtype("cuda", None) == ("cuda", torch.bfloat16)
    assert machine.device_and_dtype("cpu", None) == ("cpu", torch.float32)


def test_a_gpu_is_used_without_cudnns_attention_and_by_its_number(card):
    told = card((9, 0))
    machine.device_and_dtype("cuda:1", None)
    assert told == ["cuda:1", False]
    told.clear()
    machine.device_and_dtype("cuda", None)  # set_device takes no device without a number
    assert told == [False]
    told.clear()
    machine.device_and_dtype("cpu", None)
    assert told == []


def test_the_fused_dequantization_is_for_cuda_and_has_the_same_bits(monkeypatch):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    assert compiled.fused_form(torch.device("cpu")) is None
    calls = []

    def compile(function, dynamic):
        calls.append(dynamic)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    compiled.compiled_dequantize.cache_clear()
    fused = compiled.compiled_dequantize(torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        quantized = quantize_nf4(weight.to(dtype))
        expected = dequantize_nf4(quantized)
        with monkeypatch.context() as patch:
            patch.setattr("dpo_minimal.nf4.fused_form", lambda device: fused)
            assert torch.equal(dequantize_nf4(quantized), expected)
    assert calls == [True]  # once per device
    compiled.compiled_dequantize.cache_clear()


def test_without_a_compiler_that_is_said_once_and_pieces_are_used(monkeypatch, capsys):
    def compile(function, dynamic):
        raise ImportError("No module named 'triton'\nand much more")

    monkeypatch.setattr(torch, "compile", compile)
    compiled.compiled_dequantize.cache_clear()
    assert [compiled.compiled_dequantize(torch.device("cpu")) for _ in range(3)] == [None] * 3
    line = "warning   no compiler for the GPU, 4-bit layers are slower (No module named 'triton')\n"
    assert capsys.readouterr().out == line
    compiled.compiled_dequantize.cache_clear()


def test_a_table_is_copied_to_a_device_once():
    first, second = (on_device(DYNAMIC_CODE, torch.device("meta")) for _ in range(2))
    assert first is second and first.device.type == "meta"


def recomputes(monkeypatch, free_gb, flag=None, device="cuda", stage="dpo", length=500):
    """What `preflight.recomputes` says for a tiny model and this much free memory."""
    monkeypatch.setattr(preflight, "memory_now", lambda device: (0, int(free_gb * 1e9)))
    args = argparse.Namespace(
        gradient_checkpointing=flag, max_length=length, lora_r=8, target_modules="all",
        lora_dropout=0.0, no_quantize=False,
    )  # fmt: skip
    run = SimpleNamespace(args=args, device=device, dtype=torch.bfloat16)
    pair = EncodedPair([0] * 300, [0] * 100, [0] * 100)
    stage = SimpleNamespace(name=stage)
    settings = Settings(learning_rate=1.0, batch_size=4)
    return preflight.recomputes(run, tiny_llama(), stage, [None, pair], settings)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_checkpointing_is_chosen_by_the_memory_that_a_step_is_predicted_to_take(monkeypatch, stage):
    assert not recomputes(monkeypatch, 80, stage=stage)
    assert recomputes(monkeypatch, 0.001, stage=stage)
    low, high = 0.0, 80.0  # where it changes, by bisection: the prediction is 90% of that
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if recomputes(monkeypatch, middle, stage=stage) else (low, middle)
        )
    model, width = tiny_llama(), 500
    run = SimpleNamespace(device="cuda", dtype=torch.bfloat16, args=argparse.Namespace(
        lora_r=8, target_modules="all", lora_dropout=0.0, no_quantize=False))  # fmt: skip
    settings = Settings(learning_rate=1.0, batch_size=4)
    choice = dict(is_dpo=stage == "dpo", recompute=False)
    more = preflight.predicted(run, model.config, settings, width, **choice)
    assert high == pytest.approx(more / 0.9 / 1e9, rel=1e-6)


def test_a_target_by_its_full_name_counts_for_all_layers():
    step = SimpleNamespace(targets="model.layers.1.self_attn.q_proj,v_proj")
    names = ["model.layers.0.self_attn.q_proj", "q_proj", "model.layers.0.self_attn.v_proj"]
    assert all(memory.Step.is_target(step, name) for name in names)
    assert not memory.Step.is_target(step, "k_proj")


def test_the_flag_wins_and_on_a_cpu_it_is_on(monkeypatch):
    assert recomputes(monkeypatch, 80, flag=True) is True
    assert recomputes(monkeypatch, 0.001, flag=False) is False
    assert recomputes(monkeypatch, 80, device="cpu") is True


@pytest.fixture
def benchmark(monkeypatch):
    """A function that imports a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def count(benchmark):
    """benchmarks/count.py."""
    return benchmark("count")


def counted(count, monkeypatch, *flags):
    """The parts of a step of the tiny shape."""
    parts = []
    monkeypatch.setattr(count, "save", lambda args, result: parts.append(result["parts"]))
    command = ["count.py", "--model", "random:tiny", "--pairs", "3", "--length", "40", *flags]
    monkeypatch.setattr(sys, "argv", command)
    count.main()
    return parts[0]


def test_what_a_step_does_on_a_gpu_is_counted_as_by_hand(count, monkeypatch):
    parts = counted(count, monkeypatch)
    L, B, D, T = 2, 3, 64, 40 + 20  # a row is the prompt (20) and both answers
    # A token sees the tokens before it and itself: 40 of prompt + chosen; the 20 of rejected see
    # the prompt as well.
    seen = 40 * 41 // 2 + 20 * 20 + 20 * 21 // 2
    assert parts["attention"]["flops"] == L * 4 * B * seen * D * 3.5
    masked = counted(count, monkeypatch, "--no-ragged")
    assert masked["attention"]["flops"] == L * 4 * B * T * T * D * 3.5
    assert parts["attention"]["launches"] == 2 * L
    again = counted(count, monkeypatch, "--gradient-checkpointing")
    assert again["attention"]["launches"] == 3 * L
    slow = counted(count, monkeypatch, "--no-fused")
    assert slow["matrix products"] == parts["matrix products"]
    # W is made 7 times a block in forward. Backward makes it once more, but for the first three
    # layers, whose input needs no gradient. One kernel stands for four: indices to int64, gather,
    # multiply, write. And once the table of byte values is copied to the device.
    uses = 7 * L + 7 * L - 3
    saved = slow["dequantizing"]["launches"] - parts["dequantizing"]["launches"]
    assert saved in (3 * uses, 3 * uses + 1)
    assert slow["dequantizing"]["bytes"] > 5 * parts["dequantizing"]["bytes"] > 0


def test_the_roofline_has_the_floor_and_the_share_of_what_is_counted(benchmark):
    floor = benchmark("floor")
    counted = {"base and head": 6e9, "adapters": 2e9, "attention": 3e9}
    found = {"products": 4.0, "attention": 12.0, "the rest": 1.0}
    lines = floor.roofline(counted, {"products": 4e9, "attention": 1e9}, found)
    assert lines["products"] == {"floor_seconds": 2.0, "seconds": 4.0, "share": 0.5}
    assert lines["attention"] == {"floor_seconds": 3.0, "seconds": 12.0, "share": 0.25}
    assert lines["the rest"] == {"floor_seconds": 0.0, "seconds": 1.0, "share": None}


def test_a_profile_tells_each_operation_once(benchmark):
    floor, wall = benchmark("floor"), []
    layer = NF4Linear(quantize_nf4(torch.randn(1024, 1024)))
    x = torch.randn(1, 1024, requires_grad=True)  # so nearly all of the time is dequantizing

    def step():
        started = time.perf_counter()
        layer(x).sum().backward()
        wall.append(time.perf_counter() - started)

    step()
    found = floor.seconds_by_part(step, "cpu")
    assert set(found) == {"products", "attention", "dequantizing", "the rest"}
    assert found["products"] > 0 and found["attention"] == 0
    assert found["dequantizing"] > sum(found.values()) / 2
    assert sum(found.values()) < 1.3 * wall[-1]  # twice as much if it were counted twice
