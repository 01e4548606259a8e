"""Long work says how far it is, and short work says nothing."""

import pytest
import torch
from helpers import tiny_llama

from dpo_minimal.data import EncodedPair, PreferencePair
from dpo_minimal.evaluate import kl_estimate
from dpo_minimal.extras import large, progress
from dpo_minimal.formats.huggingface import load_llama, save_llama
from dpo_minimal.generate import make_chooser, sample
from dpo_minimal.lora import add_adapter
from dpo_minimal.reference import pair_logps


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by 3 seconds whenever it is read."""
    seconds = [100.0]

    def tick():
        seconds[0] += 3
        return seconds[0]

    monkeypatch.setattr(progress.time, "monotonic", tick)
    return seconds


def test_a_line_comes_when_five_seconds_were_quiet(clock, capsys):
    for done in range(7):
        progress.show("counting", done, 7, "sheep")
    # read at 3, 6, 9, ...: at 9 six seconds were quiet, then at 15 and 21
    said = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert said == [f"counting: {n} of 7 sheep" for n in (2, 4, 6)]


def test_quick_work_says_nothing_and_a_beginning_counts_anew(capsys):
    progress.last[0] = -1e9  # the last line was long ago
    for done in range(9):
        progress.show("counting", done, 9, "sheep")
    assert capsys.readouterr().err == ""


def test_every_long_phase_speaks(tmp_path, clock, capsys, monkeypatch):
    model = tiny_llama(torch.float32)
    save_llama(model, tmp_path / "model")
    load_llama(tmp_path / "model")
    add_adapter(model, "sft", r=2)
    pairs = [EncodedPair([1, 2], [3, 4], [5, 6])] * 8
    pair_logps(model, pairs, [[i] for i in range(8)], "cpu")
    sample(model, [[1, 2]], 8, 99, make_chooser(0))
    kl_estimate(model, ["sft"], [[1, 2]] * 8, [[3, 4]] * 8, "cpu", batch_size=1)
    monkeypatch.setattr(large, "SMALL", 5)
    large.keep(PreferencePair(f"{i}", "yes", "no") for i in range(8))
    said = capsys.readouterr().err
    phases = ["writing ", "reading ", "log-probabilities of pairs", "sampling 1 answers", "KL"]
    for phase in [*phases, "reading large data: 2 more pairs so far"]:
        assert phase in said


def test_a_slow_batch_speaks_forward_and_backward_and_only_within_the_context(clock, capsys):
    model = tiny_llama(torch.float32, num_hidden_layers=4)
    model.gradient_checkpointing = True  # backward computes each block again
    tokens = torch.ones(1, 4, dtype=torch.int64)
    progress.last[0] = clock[0]
    with progress.watched(model.model.layers, compiled=False):
        model(tokens).sum().backward()
    said = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    # read at 3, 6, 9, ...: more than eight seconds after the last line at every third block
    assert said == ["3", "3"]  # the third going up, and, of 4, 3, 2, 1 going down, the second
    model(tokens)
    with progress.watched(model.model.layers, compiled=True):
        model(tokens)
    assert capsys.readouterr().err == ""
