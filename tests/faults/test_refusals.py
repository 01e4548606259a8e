"""What goes wrong is one line with exit status 2, and nothing that was good is lost."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import command, preference_rows, refuse, write_rows

import train
from dpo_minimal import InputError
from dpo_minimal.batches import pair_order
from dpo_minimal.data import EncodedPair
from dpo_minimal.extras import ask, lock
from dpo_minimal.extras.command_line import real, run_command, whole
from dpo_minimal.files import whole_file
from dpo_minimal.formats.huggingface import load_llama, save_llama
from dpo_minimal.formats.peft import load_adapter, save_adapter
from dpo_minimal.formats.rows import pair_of
from dpo_minimal.formats.safetensors import open_safetensors
from dpo_minimal.loop import Settings, Stage, load_state
from dpo_minimal.loop import train as train_loop
from dpo_minimal.lora import add_adapter

ROOT = Path(__file__).parents[2]
FEW = ["--batch-size", 4, "--grad-accum", 1, "--max-steps", 2, "--max-length", 96]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 44 preference pairs."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", preference_rows())


# Flags.

BAD_FLAGS = [
    ("--beta nan", "--beta", "not above 0"),
    ("--beta inf", "--beta", "not above 0"),
    ("--beta 0", "--beta", "not above 0"),
    ("--beta much", "--beta", "not a number"),
    ("--label-smoothing 0.5", "--label-smoothing", "at least 0 and below 0.5"),
    ("--learning-rate -1", "--learning-rate", "above 0 and at most 1"),
    ("--learning-rate 1e30", "--learning-rate", "at most 1"),
    ("--learning-rate nan", "--learning-rate", "at most 1"),
    ("--epochs 0", "--epochs", "above 0"),
    ("--epochs -1", "--epochs", "above 0"),
    ("--epochs nan", "--epochs", "above 0"),
    ("--epochs inf", "--epochs", "at most 1e+06"),
    ("--batch-size 0", "--batch-size", "between 1"),
    ("--batch-size 2.5", "--batch-size", "not a whole number"),
    ("--grad-accum 1000000000", "--grad-accum", "between 1 and 1048576"),
    ("--max-length 1000000000", "--max-length", "between 1 and 1048576"),
    ("--warmup-steps -1", "--warmup-steps", "between 0"),
    ("--eval-every -5", "--eval-every", "between 0"),
    ("--save-every -1", "--save-every", "between 0"),
    ("--seed 1000000000000000000000", "--seed", "not a whole number"),
    ("--seed -1", "--seed", "between 0 and 9223372036854775807"),
    ("--lora-r 1000000000", "--lora-r", "between 1 and 16384"),
    ("--lora-alpha nan", "--lora-alpha", "above 0"),
    ("--lora-dropout 2", "--lora-dropout", "at least 0 and below 1"),
    ("--lora-dropout -1", "--lora-dropout", "at least 0"),
    ("--lora-dropout nan", "--lora-dropout", "at least 0"),
    ("--device x", "--device x", "give cpu, cuda"),
    ("--device mps", "--device mps", "no such GPU"),
    ("--device cuda:x", "--device cuda:x", "give cpu, cuda"),
    ("--device cuda:99", "--device cuda:99", "no such GPU"),
    ("--loss dpo", "--loss", "invalid choice"),
    ("--loss robust", "--loss robust", "needs --label-smoothing"),
    ("--loss ipo --label-smoothing 0.1", "--label-smoothing", "sigmoid or robust, not ipo"),
    ("--simpo-gamma 1", "--simpo-gamma", "goes with --loss simpo, not sigmoid"),
    ("--simpo-gamma -1", "--simpo-gamma", "at least 0"),
    ("--loss orpo --nll-weight 1", "--nll-weight", "has that term already"),
    ("--modle x", "--modle", "unrecognized"),
]


@pytest.mark.parametrize(("flags", "name", "said"), BAD_FLAGS, ids=[row[0] for row in BAD_FLAGS])
def test_a_flag_without_sense_is_refused_with_its_name_and_what_would_do(
    tmp_path, capsys, model_folder, data, flags, name, said
):
    usual = ["--model", model_folder, "--data", data, "--out", tmp_path / "run"]
    err = refuse(capsys, *usual, *flags.split(" "))
    assert name in err and said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags", ["--top-p 0", "--top-p -1", "--top-p 1.5", "--temperature nan", "--temperature -1"]
    + ["--seed 100000000000000000000", "--max-new-tokens 0"],
)  # fmt: skip
def test_a_flag_of_generate_without_sense_is_refused(capsys, monkeypatch, model_folder, flags):
    words = ["generate", "--model", str(model_folder), "--prompt", "Is it?", *flags.split(" ")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        run_command(ask.main)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and flags.split(" ")[0] in err


def test_bounds_belong_to_a_kind_or_not():
    assert whole(1, 3)("1") == 1 and whole(1, 3)("3") == 3 and whole(-2)("-2") == -2
    assert real(above=0, high=1)("1") == 1 and real(low=0, below=1)("0") == 0
    for kind, text in (
        (real(above=0), "0"),
        (real(below=1), "1"),
        (whole(1), "0"),
        (real(), "nan"),
    ):
        with pytest.raises(Exception, match="not"):
            kind(text)


# Rows.


@pytest.mark.parametrize("wrong", [None, 3, ["a"], ["a", {"role": "user"}]])
@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_a_dialogue_that_is_not_text_is_refused_with_its_place(name, wrong):
    row = {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}
    with pytest.raises(InputError, match=f"^file, line 7: the field '{name}' is .*, not text"):
        pair_of("file, line 7", row | {name: wrong})


def test_an_input_that_is_not_text_is_refused():
    row = {"instruction": "Sum up.", "input": {"a": 1}, "chosen": "b", "rejected": "c"}
    with pytest.raises(InputError, match="the field 'input' is dict, not text"):
        pair_of("file, line 7", row)


# Numbers that are not finite.


def nan_stage(model, nan_at):
    """Steps of one pair each, whose loss is NaN or infinite at some steps: {step: value}."""
    pairs = [EncodedPair([1], [2 + i], [3 + i]) for i in range(8)]
    calls = []

    def objective(model, batch):
        calls.append(batch.indices)
        loss = sum((p**2).sum() for p in model.parameters() if p.requires_grad)
        return (loss * nan_at.get(len(calls) - 1, 1.0))[None], {}

    def collate(rows):
        return train.pair_batch(pairs, rows, "cpu")

    return Stage("dpo", objective, pair_order(pairs, 1, 0), collate), calls


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_loop_stops_before_a_step_that_is_not_finite_and_keeps_the_last_state(tmp_path, value):
    model = torch.nn.Linear(2, 2)
    settings = Settings(learning_rate=0.1, batch_size=1, save_every=2)
    stage, calls = nan_stage(model, {3: value})
    (tmp_path / "state").mkdir()
    with pytest.raises(InputError, match=f"^dpo: loss is {value} in step 4, pairs ") as caught:
        train_loop(model, stage, settings, tmp_path)
    assert len(calls) == 4 and f"pairs {calls[3]}; usually" in str(caught.value)
    assert all(p.isfinite().all() for p in model.parameters())
    good = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(good.parameters())
    assert load_state(tmp_path / "state" / "dpo.pt", good, optimizer, {})[0] == 2
    assert all(p.isfinite().all() for p in good.parameters())


def test_a_gradient_that_is_not_finite_stops_the_loop_too(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    stage, _ = nan_stage(model, {})

    def objective(model, batch):  # the root's slope at 0 is infinite
        return model.weight.sub(model.weight.detach()).abs().sqrt().sum()[None], {}

    with pytest.raises(InputError, match="^dpo: grad_norm is (nan|inf) in step 1"):
        train_loop(model, replace(stage, objective=objective), Settings(0.1, 1), tmp_path)


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_checkpoint_with_a_number_that_is_not_finite_is_refused(
    tmp_path, model_folder, quantize, name, value
):
    model = load_llama(model_folder, quantize=None)
    model.get_parameter(name).data.flatten()[5] = value
    save_llama(model, tmp_path / "model", torch.float32)
    with pytest.raises(InputError, match=f"{name} holds NaN or infinite numbers"):
        load_llama(tmp_path / "model", quantize=quantize)


def test_an_adapter_with_a_number_that_is_not_finite_is_neither_written_nor_read(
    tmp_path, model_folder
):
    model = load_llama(model_folder)
    add_adapter(model, "sft", r=2)
    save_adapter(model, ["sft"], tmp_path / "good")
    weights = next(p for n, p in model.named_parameters() if n.endswith("lora_B"))
    weights.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="is not written: .*lora_B.* holds NaN"):
        save_adapter(model, ["sft"], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    file = tmp_path / "good" / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-4:] = b"\x00\x00\xc0\x7f"  # a float32 NaN
    file.write_bytes(raw)
    assert any(not t.read().isfinite().all() for t in open_safetensors(file).values())
    with pytest.raises(InputError, match="holds NaN or infinite numbers"):
        load_adapter(load_llama(model_folder), tmp_path / "good", "sft")


# The system says no.


def run_train(*flags, **options):
    """`python train.py` in a process of its own: (status, stderr)."""
    words = [sys.executable, ROOT / "train.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )
    return done.returncode, done.stderr


def test_a_file_that_cannot_grow_is_one_line_and_the_last_state_is_whole(
    tmp_path, model_folder, data
):
    resource = pytest.importorskip("resource", reason="Windows limits no file's size")
    flags = ["--model", model_folder, "--data", data, *FEW, "--out", tmp_path / "run"]

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    status, err = run_train(*flags, "--save-every", 1, preexec_fn=small_files)
    assert status == 2 and err.count("\n") == 1 and "File too large" in err
    assert "state" in err and not list((tmp_path / "run").rglob("*.partial"))
    shutil.rmtree(tmp_path / "run" / "state")
    command("--out", tmp_path / "run", "--resume")  # with room it goes on
    assert (tmp_path / "run" / "merged").exists()


def test_what_was_in_a_files_place_stays_if_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / "file"
    path.write_text("good")
    said = "file: cannot be written .No space left"
    with pytest.raises(InputError, match=said), whole_file(path) as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "good" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_out_that_cannot_be_a_folder_is_one_line(tmp_path, capsys, model_folder, data):
    flags = ["--model", model_folder, "--data", data, *FEW]
    assert "File name too long" in refuse(capsys, *flags, "--out", tmp_path / ("x" * 300))
    assert "/proc" in refuse(capsys, *flags, "--out", "/proc/run")


# Two at once.


def test_of_two_runs_in_one_folder_one_runs_and_the_other_says_who_does(
    tmp_path, model_folder, data
):
    pytest.importorskip("fcntl", reason="folders are not locked on Windows")
    flags = ["--model", model_folder, "--data", data, *FEW, "--out", tmp_path / "run"]
    words = list(map(str, [sys.executable, ROOT / "train.py", *flags]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = dict(cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    both = [subprocess.Popen(words, text=True, **options) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    loser = next(i for i, process in enumerate(both) if process.returncode == 2)
    assert errors[loser].count("\n") == 1
    holder = f"process {both[1 - loser].pid} on"
    assert holder in errors[loser] or "is not empty" in errors[loser] or "another" in errors[loser]
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().count('"loss"')
    assert steps == 2 * 2


def test_resuming_a_run_that_is_still_at_work_is_refused_until_it_dies(
    tmp_path, capsys, model_folder, data
):
    pytest.importorskip("fcntl", reason="folders are not locked on Windows")
    out = tmp_path / "run"
    flags = ["--model", model_folder, "--data", data, *FEW, "--max-steps", 5000, "--epochs", 999]
    words = list(map(str, [sys.executable, ROOT / "train.py", *flags, "--out", out]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    while "step " not in process.stdout.readline():
        assert process.poll() is None
    rows = (out / "metrics.jsonl").read_text()
    err = refuse(capsys, "--out", out, "--resume")
    assert f"{out}: process {process.pid} on" in err and "at work here" in err
    process.kill()  # the lock needs no farewell
    process.communicate()
    assert (out / "metrics.jsonl").read_text().startswith(rows)  # nobody has rewound it
    lock.hold(out.absolute())
