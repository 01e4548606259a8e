"""Long work says how far it is, and short work says nothing."""

import pytest
import torch
from helpers import tiny_llama

from dpo_minimal.data import EncodedPair
from dpo_minimal.evaluate import kl_estimate
from dpo_minimal.extras import progress
from dpo_minimal.formats.huggingface import load_llama, save_llama
from dpo_minimal.generate import sample
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


def test_every_long_phase_speaks(tmp_path, clock, capsys):
    model = tiny_llama(torch.float32)
    save_llama(model, tmp_path / "model")
    load_llama(tmp_path / "model")
    add_adapter(model, "sft", r=2)
    pairs = [EncodedPair([1, 2], [3, 4], [5, 6])] * 8
    pair_logps(model, pairs, [[i] for i in range(8)], "cpu")
    sample(model, [[1, 2]], 8, 99, 0.0, 1.0, torch.Generator())
    kl_estimate(model, ["sft"], [[1, 2]] * 8, [[3, 4]] * 8, "cpu", batch_size=1)
    said = capsys.readouterr().err
    for phase in ("writing ", "reading ", "log-probabilities of pairs", "sampling 1 answers", "KL"):
        assert phase in said
