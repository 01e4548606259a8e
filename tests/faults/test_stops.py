"""Runs that are stopped, damaged or resumed with other data: nothing is lost, nothing is mixed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_train import assert_same_run, command, preference_rows, refuse, write_rows

from dpo_minimal import InputError, loop
from dpo_minimal.extras import preflight
from dpo_minimal.extras.reading import read_json
from dpo_minimal.files import read_sealed, write_sealed
from dpo_minimal.formats.rows import read_rows
from dpo_minimal.formats.tokenizer_json import JsonTokenizer
from dpo_minimal.llama import LlamaConfig
from dpo_minimal.log import rewind

ROOT = Path(__file__).parents[2]
STEPS = ["--batch-size", 2, "--grad-accum", 1, "--max-steps", 12, "--max-length", 96]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 44 preference pairs."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", preference_rows())


@pytest.fixture(scope="module")
def flags(model_folder, data):
    """A small run of twelve steps per stage."""
    return ["--model", model_folder, "--data", data, *STEPS]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, flags):
    """The folder of that run, uninterrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    command(*flags, "--out", out)
    return out


def interrupt(monkeypatch, out, stage, step, number):
    """Let a run signal itself in a step, and hand over the message with which it ends."""
    write = loop.Log.write

    def signal_first(log, at, prefix="", **values):
        if (log.stage, at, prefix) == (stage, step, ""):
            os.kill(os.getpid(), number)
        write(log, at, prefix, **values)

    monkeypatch.setattr(loop.Log, "write", signal_first)
    with pytest.raises(KeyboardInterrupt) as caught:
        command(*out)
    monkeypatch.setattr(loop.Log, "write", write)
    return str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("stage", "step"), [("sft", 0), ("sft", 4), ("dpo", 7)])
def test_a_signal_lets_the_step_finish_saves_a_state_and_loses_nothing(
    tmp_path, flags, monkeypatch, capsys, whole_run, stage, step, number
):
    out = tmp_path / "run"
    said = interrupt(monkeypatch, [*flags, "--out", out], stage, step, number)
    assert said == f"{stage}: stopped at step {step + 1}; --resume goes on"
    assert "once more to stop at once" in capsys.readouterr().err
    assert (out / "state" / f"{stage}.pt").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before the stage
    command("--out", out, "--resume")
    assert "begins anew" not in capsys.readouterr().out
    assert_same_run(out, whole_run)
    assert list((out / "state").iterdir()) == []


def test_a_signal_in_the_last_evaluation_stops_the_run_before_the_next_stage(
    tmp_path, flags, monkeypatch, whole_run
):
    out, write = tmp_path / "run", loop.Log.write

    def signal_at_the_end(log, step, prefix="", **values):
        if prefix and step == 12:
            os.kill(os.getpid(), signal.SIGINT)
        write(log, step, prefix, **values)

    monkeypatch.setattr(loop.Log, "write", signal_at_the_end)
    with pytest.raises(KeyboardInterrupt, match="^dpo: stopped at step 12; --resume goes on"):
        command(*flags, "--out", out)
    monkeypatch.setattr(loop.Log, "write", write)
    assert not (out / "dpo").exists() and (out / "state" / "dpo.pt").exists()
    command("--out", out, "--resume")
    assert_same_run(out, whole_run)


def test_sigterm_ends_a_process_with_one_line_and_status_130(tmp_path, flags):
    words = [sys.executable, ROOT / "train.py", *flags, "--max-steps", 5000, "--epochs", 999]
    process = subprocess.Popen(
        list(map(str, [*words, "--out", tmp_path / "run"])),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "step " not in process.stdout.readline():
        assert process.poll() is None
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - started < 30
    first, second = err.splitlines()
    assert first.startswith("stopping after this step") and second.startswith("sft: stopped at")
    assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == ["sft.pt"]


def test_a_second_signal_stops_at_once(tmp_path, flags, monkeypatch):
    write = loop.Log.write

    def signal_twice(log, step, prefix="", **values):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        write(log, step, prefix, **values)

    monkeypatch.setattr(loop.Log, "write", signal_twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        command(*flags, "--out", tmp_path / "run")
    assert str(caught.value) == ""
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 and not (tmp_path / "run" / "state" / "sft.pt").exists()


# Resuming.


@pytest.fixture
def interrupted(tmp_path, flags, monkeypatch):
    """The folder of a run that was stopped in its eighth step of DPO."""
    out = tmp_path / "run"
    interrupt(monkeypatch, [*flags, "--out", out], "dpo", 7, signal.SIGINT)
    return out


@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "empty", "foreign"])
def test_a_damaged_state_is_refused_by_name_with_the_remedy(interrupted, capsys, damage):
    path = interrupted / "state" / "dpo.pt"
    raw = bytearray(path.read_bytes())
    if damage == "a flipped bit":
        raw[len(raw) // 2] ^= 1
    changed = {"cut off": raw[:-100], "empty": b"", "foreign": b"hello " * 20}.get(damage, raw)
    path.write_bytes(bytes(changed))
    err = refuse(capsys, "--out", interrupted, "--resume")
    assert str(path) in err and "damaged; delete it" in err
    path.unlink()
    command("--out", interrupted, "--resume")
    assert (interrupted / "merged").exists()
    said = capsys.readouterr().out  # DPO, and only DPO, begins once more
    assert said.count("no saved state: begins anew") == 1 and "sft  " not in said


def test_sealed_bytes_come_back_or_are_refused_whichever_byte_changes(tmp_path):
    path = tmp_path / "file"
    write_sealed(path, b"some bytes")
    good = path.read_bytes()
    assert read_sealed(path) == b"some bytes"
    for i in range(len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        with pytest.raises(InputError, match="damaged"):
            read_sealed(path)


@pytest.mark.parametrize("change", ["order", "fewer", "answer"])
def test_a_resumed_run_refuses_other_data_under_the_same_name(
    tmp_path, model_folder, monkeypatch, capsys, change
):
    rows, path, out = preference_rows(), tmp_path / "pairs.jsonl", tmp_path / "run"
    write_rows(path, rows)
    flags = ["--model", model_folder, "--data", path, *STEPS, "--out", out]
    interrupt(monkeypatch, flags, "dpo", 3, signal.SIGINT)
    changed = {
        "order": rows[::-1],
        "fewer": rows[:-1],
        "answer": [*rows[:-1], rows[-1] | {"chosen": "Yes."}],
    }
    write_rows(path, changed[change])
    capsys.readouterr()
    err = refuse(capsys, "--out", out, "--resume")
    assert "the data changed since this run began" in err
    write_rows(path, rows)
    command("--out", out, "--resume")
    assert (out / "merged").exists()


def test_a_finished_run_says_so(whole_run, capsys):
    command("--out", whole_run, "--resume")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "every stage that was asked for is finished" in said


def test_a_state_that_a_kill_left_behind_a_finished_stage_goes(interrupted, whole_run):
    shutil.copytree(whole_run / "dpo", interrupted / "dpo")  # the kill came before the unlink
    assert (interrupted / "state" / "dpo.pt").exists()
    command("--out", interrupted, "--resume")
    assert list((interrupted / "state").iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"arguments": 3}', "{" * 9, "[" * 100_000])
def test_a_config_json_that_is_not_a_runs_is_refused(interrupted, capsys, text):
    (interrupted / "config.json").write_text(text)
    assert "config.json" in refuse(capsys, "--out", interrupted, "--resume")


def test_rewinding_drops_rows_that_are_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [{"stage": "sft", "step": 0}, {"stage": "sft", "step": 1}]
    bad = ["[]", "3", '{"stage": "sft"}', '{"stage": "sft", "st', "{}}", ""]
    path.write_text("\n".join([json.dumps(good[0]), *bad, json.dumps(good[1])]) + "\n")
    rewind(path, "sft", 5)
    assert [json.loads(line) for line in path.read_text().splitlines()] == good


# Files that are no JSON that anybody means.


@pytest.mark.parametrize("text", ["[" * 100_000, '{"prompt": ' + "9" * 5000 + "}"])
def test_json_too_deep_or_with_numbers_too_long_is_refused_with_its_place(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match="rows.jsonl, line 1: cannot be read"):
        list(read_rows(path))
    with pytest.raises(InputError, match="rows.jsonl: not a JSON file"):
        read_json(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"bos_token": 1}', '{"bos_token": {"content": 1}}', "\ufeff{}", "{}"]
)
def test_a_tokenizer_config_that_names_no_bos_is_refused(tmp_path, text):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(text, "utf-8")
    with pytest.raises(InputError, match="tokenizer_config.json"):
        JsonTokenizer(tmp_path)


# The tokenizer and the model.

CONFIG = LlamaConfig(
    vocab_size=100,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    max_position_embeddings=64,
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bos_id": -1}, "BOS is -1"),
        ({"eos_id": -1}, "EOS is -1"),
        ({"eos_id": 100}, "EOS is 100, but the model's vocabulary has 100 entries"),
        ({"vocab_size": 101}, "last id is 100"),
    ],
)
def test_a_tokenizer_with_ids_that_the_model_lacks_is_refused(changes, said):
    ids = {"bos_id": 1, "eos_id": 2, "vocab_size": 100}
    preflight.check_fit("folder", SimpleNamespace(**ids), CONFIG, 64)
    with pytest.raises(InputError, match=f"^folder: the tokenizer's {said}"):
        preflight.check_fit("folder", SimpleNamespace(**ids | changes), CONFIG, 64)


def test_rows_longer_than_the_models_context_are_warned_of():
    said, tokenizer = [], SimpleNamespace(bos_id=1, eos_id=2, vocab_size=100)
    preflight.check_fit("folder", tokenizer, CONFIG, 64, said.append)
    assert said == []
    preflight.check_fit("folder", tokenizer, CONFIG, 65, said.append)
    assert said == ["warning   --max-length 65 is longer than the model's context of 64 tokens"]
