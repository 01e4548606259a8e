"""The command line, end to end, on very small runs."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from dpo_minimal import forum, loop, reference
from dpo_minimal.batches import answer_rows
from dpo_minimal.checkpoint import load_adapter, load_llama, save_llama
from dpo_minimal.data import encode_pair, load_splits
from dpo_minimal.extras.command_line import run_command
from dpo_minimal.formats.safetensors import open_safetensors
from dpo_minimal.llama import Llama, LlamaConfig
from dpo_minimal.lora import active_adapters
from dpo_minimal.loss import sequence_logps
from dpo_minimal.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
LN2 = 0.6931471805599453
TIMING = ("tokens_per_second", "peak_memory_gb")
TINY = LlamaConfig(
    vocab_size=500,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
STEPS = ["--batch-size", 4, "--grad-accum", 1, "--max-steps", 3, "--max-length", 96]


def command(*flags):
    """Run train.py's main in this process, with these flags."""
    argv, sys.argv = sys.argv, ["train.py", *map(str, flags)]
    try:
        train.main()
    finally:
        sys.argv = argv


def preference_rows(n=44):
    """Rows of the forum in the plain form."""
    rng = random.Random(0)
    rows = []
    for question in list(forum.QUESTIONS)[:: len(forum.QUESTIONS) // n][:n]:
        chosen, rejected = forum.vote(question, rng.sample(forum.candidates(question), 2), rng)
        rows.append({"prompt": question, "chosen": chosen, "rejected": rejected})
    return rows


def write_rows(path, rows):
    """Rows as JSON Lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A file of 44 preference pairs."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", preference_rows())


@pytest.fixture(scope="session")
def flags(model_folder, data):
    """A small run with a model of its own."""
    return ["--model", model_folder, "--data", data, *STEPS]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, flags):
    """The folder of a small run from beginning to end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    command(*flags, "--out", out)
    return out


def metrics(out):
    """The rows of a run's metrics.jsonl without what depends on the clock or the machine."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def assert_same_run(out, expected):
    """Equal metrics, weights and answers."""
    assert metrics(out) == metrics(expected)
    for file in ("sft/adapter_model.safetensors", "dpo/adapter_model.safetensors"):
        assert (out / file).read_bytes() == (expected / file).read_bytes(), file
    for file in ("eval.json", "samples.md", "merged/model.safetensors"):
        assert (out / file).read_bytes() == (expected / file).read_bytes(), file


# A run.


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_step_0_of_dpo_is_exact_and_the_margin_moves_from_there(tmp_path, flags, loss, whole_run):
    out = whole_run
    if loss != "sigmoid":
        out = tmp_path / "run"
        command(*flags, "--loss", loss, "--beta", 0.25, "--lora-dropout", 0, "--out", out)
    first, second, third = (row for row in metrics(out) if row["stage"] == "dpo" and "loss" in row)
    # delta = 0: ln 2, (0 - 1 / (2 * 0.25))^2, max(0, 1 - 0)
    expected = {"sigmoid": LN2, "ipo": 4.0, "hinge": 1.0}[loss]
    # half a unit in the last place of a float32 between 0.5 and 1; 1 and 4 are exact
    assert abs(first["loss"] - expected) <= (2**-25 if loss == "sigmoid" else 0)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == 0
    assert first["rewards/ties"] == 1 and first["rewards/accuracies"] == 0
    assert first["grad_norm"] > 0
    assert second["rewards/margins"] != 0 != third["rewards/margins"]


def test_step_0_of_dpo_is_exact_also_with_dropout_accumulation_and_bfloat16(tmp_path, flags):
    more = ["--lora-dropout", 0.5, "--grad-accum", 3, "--dtype", "bfloat16", "--max-steps", 1]
    command(*flags, *more, "--target-modules", "all", "--out", tmp_path / "run")
    first = next(r for r in metrics(tmp_path / "run") if r["stage"] == "dpo" and "loss" in r)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0 and first["rewards/ties"] == 1
    assert abs(first["loss"] - LN2) <= 2**-23  # the sum of three micro-batches rounds once more


def test_a_run_leaves_the_files_that_the_design_names(whole_run, flags):
    names = {path.name.split("-")[0] for path in whole_run.iterdir()} - {"curves.png"}
    assert names == {
        *("config.json", "metrics.jsonl", "eval.json", "samples.md"),
        *("sft", "dpo", "merged", "state", "reference"),  # reference-1a2b3c.safetensors
    }
    about = {"README.md", "chat_template.jinja"}
    for adapter in ("sft", "dpo"):
        files = {path.name for path in (whole_run / adapter).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors", *about}
    assert {"config.json", "model.safetensors", "tokenizer.model", *about} <= {
        path.name for path in (whole_run / "merged").iterdir()
    }
    config = json.loads((whole_run / "config.json").read_text())
    assert config["arguments"]["max_steps"] == 3 and config["arguments"]["max_length"] == 96
    assert config["stages"]["dpo"]["batch_size"] == 4 and config["versions"]["torch"]
    assert json.loads((whole_run / "sft" / "adapter_config.json").read_text())["r"] == 8
    assert json.loads((whole_run / "dpo" / "adapter_config.json").read_text())["r"] == 16
    assert not list(whole_run.rglob("*.partial"))


def test_curves_are_drawn_where_matplotlib_is(whole_run):
    pytest.importorskip("matplotlib", reason="curves need pip install matplotlib")
    assert (whole_run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_metrics_have_the_names_of_the_field(whole_run):
    rows = metrics(whole_run)
    steps = [(r["stage"], r["step"]) for r in rows if "loss" in r]
    assert steps == [(stage, step) for stage in ("sft", "dpo") for step in range(3)]
    names = {"loss", "grad_norm", "learning_rate", "num_tokens", "epoch", "stage", "step"}
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    rewards |= {"logps/chosen", "logps/rejected"}
    for row in rows:
        if "loss" in row:
            assert names | (rewards if row["stage"] == "dpo" else set()) <= row.keys()
            assert all(map(math.isfinite, (v for v in row.values() if not isinstance(v, str))))
    before, after = [r for r in rows if "eval_loss" in r]
    assert before["step"] == 0 and after["step"] == 3
    assert {f"eval_{name}" for name in rewards} <= before.keys() == after.keys()
    assert before["eval_rewards/margins"] == 0 != after["eval_rewards/margins"]


def test_the_merged_folder_is_the_policy_and_the_held_out_numbers_are_its_own(
    whole_run, flags, model_folder, data
):
    # From the files alone: merged, base + sft, and the pairs that no training saw.
    tokenizer = load_tokenizer(whole_run / "merged")
    evaluation = load_splits(data, log=lambda text: None).evaluation
    encoded = [encode_pair(tokenizer, pair, 96) for pair in evaluation]
    encoded = [pair for pair in encoded if pair]
    answers = [(p.prompt, p.chosen) for p in encoded] + [(p.prompt, p.rejected) for p in encoded]
    rows = answer_rows(answers, "cpu")
    model = load_llama(model_folder, quantize="nf4")
    load_adapter(model, whole_run / "sft", "sft")
    load_adapter(model, whole_run / "dpo", "dpo")
    logps = {}
    with torch.no_grad():
        for names in (["sft"], ["dpo"]):
            with active_adapters(model, names):
                logps[names[0]] = sequence_logps(model, *rows)
        merged = load_llama(whole_run / "merged", quantize=None)
        from_merged = sequence_logps(merged, *rows)
    # bfloat16 keeps 8 bits of each weight: some hundredths of a nat on sums of some 100 nats
    torch.testing.assert_close(from_merged, logps["dpo"], rtol=0.01, atol=0.5)
    chosen, rejected = (0.1 * (logps["dpo"] - logps["sft"])).chunk(2)
    held_out = json.loads((whole_run / "eval.json").read_text())["held_out"]
    assert held_out["eval_rewards/margins"] == pytest.approx(
        float((chosen - rejected).mean()), abs=1e-4
    )
    assert held_out["eval_rewards/chosen"] == pytest.approx(float(chosen.mean()), abs=1e-4)


def test_samples_show_held_out_questions_and_all_three_models(whole_run, data):
    text = (whole_run / "samples.md").read_text()
    held_out = {pair.prompt for pair in load_splits(data, log=lambda text: None).evaluation}
    asked = [line[4:] for line in text.splitlines() if line.startswith("### ")]
    assert len(asked) == 8 and set(asked) <= held_out
    assert text.count("- **base**:") == text.count("- **SFT**:") == text.count("- **DPO**:") == 8


def test_one_seed_gives_one_run_and_another_seed_another(tmp_path, flags, whole_run):
    torch.rand(7)  # a different random state of this process
    random.seed(9)
    command(*flags, "--out", tmp_path / "again")
    assert_same_run(tmp_path / "again", whole_run)
    command(*flags, "--seed", 1, "--out", tmp_path / "other")
    assert metrics(tmp_path / "other") != metrics(whole_run)


def test_stage_by_stage_equals_all_at_once(tmp_path, flags, whole_run):
    out = tmp_path / "run"
    for stage in ("sft", "dpo", "evaluate"):
        command(*flags, "--out", out, "--stage", stage)
        torch.rand(3)
    assert_same_run(out, whole_run)


@pytest.mark.parametrize(
    ("stage", "step"), [("sft", 1), ("sft", 2), ("dpo", 0), ("dpo", 1), ("dpo", 2)]
)
def test_resumed_after_a_kill_equals_uninterrupted(
    tmp_path, flags, monkeypatch, stage, step, whole_run
):
    out, write = tmp_path / "run", loop.Log.write

    def die(log, at, prefix="", **values):
        if (log.stage, at, prefix) == (stage, step, ""):
            raise KeyboardInterrupt
        write(log, at, prefix, **values)

    monkeypatch.setattr(loop.Log, "write", die)
    with pytest.raises(KeyboardInterrupt):
        command(*flags, "--save-every", 1, "--out", out)
    monkeypatch.setattr(loop.Log, "write", write)
    assert not (out / stage).exists() and (out / "state" / f"{stage}.pt").exists() == (step > 0)
    command("--resume", "--out", out)  # the settings are the run's own
    assert_same_run(out, whole_run)


def test_a_finished_run_resumes_to_nothing_and_a_changed_setting_is_refused(
    tmp_path, flags, whole_run, capsys
):
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    command("--resume", "--out", out)
    assert_same_run(out, whole_run)
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: command("--resume", "--out", out, "--lora-r", 4))
    assert caught.value.code == 2 and "--lora-r" in capsys.readouterr().err


def test_the_reference_is_kept_within_a_run_and_never_taken_from_another(
    tmp_path, flags, monkeypatch
):
    out, computed, right = tmp_path / "run", [], reference.reference_logps

    def count(model, batch):
        computed.extend(batch.indices)
        return right(model, batch)

    monkeypatch.setattr(reference, "reference_logps", count)
    command(*flags, "--out", out, "--stage", "sft")
    command("--out", out, "--stage", "dpo", "--epochs", 3, "--max-steps", 99)
    # Once per pair, in three epochs and two evaluations: 27 of 28 pairs fit, 16 are held out.
    assert sorted(computed) == sorted([*range(27), *range(16)])
    # The same stage after SFT has changed: what the first command computed would be wrong now.
    path = out / "sft" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    shutil.rmtree(out / "dpo")
    del computed[:]
    command("--out", out, "--stage", "dpo", "--epochs", 1, "--max-steps", 1)
    assert len(computed) == 1 + 16  # so few pairs are trained one at a time
    (first,) = [row for row in metrics(out) if row["stage"] == "dpo" and "loss" in row]
    assert first["rewards/margins"] == 0 and abs(first["loss"] - LN2) <= 2**-25


# The embedded forum, with a small forum in its place.


@pytest.fixture(scope="module")
def forum_run(tmp_path_factory):
    """The folder and the output of `python train.py` without a model, two steps a stage."""
    out = tmp_path_factory.mktemp("runs") / "forum"
    make_forum = forum.make_forum

    def small_forum(seed):
        sizes = {"pretrain": 400, "finetune": 60, "rl": 60, "evaluation": 32}
        return {part: make_forum(seed)[part][:n] for part, n in sizes.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forum, "make_forum", small_forum)
        patch.setattr(train, "TINY_LLAMA", TINY)
        command("--max-steps", 2, "--batch-size", 4, "--out", out)
    return out


def test_a_run_on_the_forum_makes_its_model_and_judges_it(forum_run):
    names = {path.name for path in forum_run.iterdir()}
    assert {"data", "base", "sft", "dpo", "merged", "eval.json", "samples.md"} <= names
    parts = {path.name for path in (forum_run / "data").iterdir()}
    assert parts == {"pretrain", "finetune", "rl", "evaluation"}
    stages = [row["stage"] for row in metrics(forum_run) if "loss" in row]
    assert stages == ["pretrain"] * 2 + ["sft"] * 2 + ["dpo"] * 2
    dpo = [row for row in metrics(forum_run) if row["stage"] == "dpo" and "loss" in row]
    assert abs(dpo[0]["loss"] - LN2) <= 2**-25 and dpo[0]["rewards/margins"] == 0
    result = json.loads((forum_run / "eval.json").read_text())
    assert result["table"].keys() == {"base", "SFT", "DPO"}
    judged = {"true_score", "share_right", "share_polite", "share_garbled"}
    told = {"win_rate_against_sft", "kl_to_sft", "reward_accuracy"}
    assert result["table"]["DPO"].keys() == judged | told
    assert 0.5 < result["truth"]["accuracy"] < 1 and result["table"]["SFT"]["kl_to_sft"] == 0


def test_the_base_of_the_forum_is_a_model_folder_like_any_other(forum_run):
    model = load_llama(forum_run / "base", quantize=None)
    assert load_tokenizer(forum_run / "base").vocab_size == model.config.vocab_size
    row = json.loads((forum_run / "data" / "rl" / "forum.jsonl").read_text().splitlines()[0])
    assert row["question"] in forum.QUESTIONS and row.keys() >= {"response_j", "response_k"}


def test_a_thread_longer_than_max_length_is_dropped_and_counted(tmp_path, monkeypatch, capsys):
    threads, widths = forum.make_forum(0)["pretrain"][:200], []
    monkeypatch.setattr(forum, "make_forum", lambda seed: {"pretrain": threads})
    monkeypatch.setattr(train, "TINY_LLAMA", TINY)
    packed_batch = train.packed_batch

    def watch(*args, **named):
        batch = packed_batch(*args, **named)
        widths.append(batch.tokens.shape[1])
        return batch

    monkeypatch.setattr(train, "packed_batch", watch)
    command("--stage", "pretrain", "--max-length", 90, "--out", tmp_path / "run")
    said = capsys.readouterr().out
    assert re.search(r"threads: dropped \d+ of 200 longer than 90 tokens", said)
    assert len(widths) > 5 and 80 < max(widths) <= 90


# Bad input: one line, exit status 2, nothing half-written.


def refuse(capsys, *flags):
    """The message of a command that is refused, after checking the manner of the refusal."""
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: command(*flags))
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_batches_of_the_evaluation_are_those_of_training(tmp_path, flags, monkeypatch):
    """A batch size that fits few pairs, and not the default: values kept by one fit the other."""
    sizes, right = [], train.one_epoch
    monkeypatch.setattr(train, "one_epoch", lambda pairs, n: sizes.append(n) or right(pairs, n))
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows(44))  # 28, and 16 are held out
    short = ["--max-steps", 1, "--max-length", 96]
    command(*flags[:2], "--data", data, *short, "--out", tmp_path / "run")
    assert sizes == [1, 1]


GOOD = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}
BAD_DATA = {
    "missing": (None, "No such file"),
    "empty": ("", "is empty"),
    "broken": ("\n".join([json.dumps(GOOD), '{"prompt": ', json.dumps(GOOD)]), "line 2"),
    "same": (f"{json.dumps(GOOD | {'rejected': 'Yes.'})}\n" * 30, "chosen = rejected"),
    "no answers": (f"{json.dumps(GOOD | {'chosen': ''})}\n" * 30, "empty answer"),
    "long": (
        "".join(f"{json.dumps(GOOD | {'prompt': f'{i} is it? ' * 99})}\n" for i in range(40)),
        "--max-length 96",
    ),
    "few": (f"{json.dumps(GOOD)}\n", "--eval-data"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_are_refused_and_leave_nothing(tmp_path, capsys, flags, kind):
    text, said = BAD_DATA[kind]
    path = tmp_path / "pairs.jsonl"
    if text is not None:
        path.write_text(text)
    err = refuse(capsys, *flags, "--data", path, "--out", tmp_path / "run")
    assert said in err and (str(path) in err or kind == "long")
    assert not (tmp_path / "run").exists()


def test_bad_held_out_data_are_refused_before_anything_is_trained(tmp_path, capsys, flags):
    path = write_rows(tmp_path / "held.jsonl", [GOOD | {"chosen": "very " * 200}] * 20)
    err = refuse(capsys, *flags, "--eval-data", path, "--out", tmp_path / "run")
    assert "held-out" in err and not (tmp_path / "run").exists()


def damaged_model(model_folder, folder, kind):
    """A copy of the model folder with one thing wrong."""
    shutil.copytree(model_folder, folder)
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "missing":
        config["num_hidden_layers"] = 3
    elif kind == "extra":
        config["num_hidden_layers"] = 1
    elif kind == "misshapen":
        config["intermediate_size"] = 32
    elif kind == "architecture":
        config["architectures"], config["model_type"] = ["MistralForCausalLM"], "mistral"
    elif kind == "no weights":
        path.unlink()
    elif kind == "no tokenizer":
        (folder / "tokenizer.model").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", "cut off or damaged"),
        ("missing", "is missing from the weights"),
        ("extra", "is not part of this Llama"),
        ("misshapen", "has shape [24, 16], config.json asks for [32, 16]"),
        ("architecture", "sliding_window"),
        ("no weights", "no model.safetensors"),
        ("no tokenizer", "no tokenizer.model"),
    ],
)
def test_a_bad_checkpoint_is_refused_and_leaves_nothing(
    tmp_path, capsys, flags, model_folder, kind, said
):
    folder = damaged_model(model_folder, tmp_path / "model", kind)
    err = refuse(capsys, *flags, "--model", folder, "--out", tmp_path / "run")
    if kind == "misshapen":  # which of the three tensors comes first is open
        assert "has shape" in err and "config.json asks for" in err
    else:
        assert said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", [True, False])
def test_an_unknown_target_module_is_refused_with_the_known_ones(tmp_path, capsys, flags, model):
    given = flags if model else ["--max-steps", 1]
    err = refuse(capsys, *given, "--target-modules", "q_proj,query", "--out", tmp_path / "run")
    assert "query" in err and "v_proj" in err and not (tmp_path / "run").exists()


def test_compiling_without_a_compiler_is_refused_before_anything_is_trained(tmp_path):
    environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    out = tmp_path / "run"
    command = [sys.executable, "train.py", "--compile", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not out.exists()
    assert done.stderr.startswith("error: --compile: torch cannot compile here")
    assert done.stderr.count("\n") == 1 and "C++ compiler" in done.stderr


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path, capsys, flags):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "not empty" in refuse(capsys, *flags, "--out", out)
    assert "not empty" in refuse(capsys, "--max-steps", 1, "--out", out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert "is a file" in refuse(capsys, *flags, "--out", out / "thesis.txt")


def test_stages_out_of_order_and_flags_that_do_not_fit_are_refused(
    tmp_path, capsys, flags, data, whole_run
):
    out = tmp_path / "run"
    assert "--stage sft" in refuse(capsys, *flags, "--out", out, "--stage", "dpo")
    assert "--model" in refuse(capsys, *flags, "--out", out, "--stage", "pretrain")
    assert "--model" in refuse(capsys, "--data", data, "--out", out)
    assert "already" in refuse(capsys, *flags, "--out", whole_run, "--stage", "dpo")
    assert not out.exists()


def test_flags_of_one_stage_are_not_those_of_the_next_but_flags_of_the_run_are(tmp_path, flags):
    out, more = tmp_path / "run", ["--learning-rate", 0.25, "--eval-every", 1]
    command(*flags, *more, "--beta", 0.3, "--out", out, "--stage", "sft")
    command("--out", out, "--stage", "dpo", "--max-steps", 2)
    config = json.loads((out / "config.json").read_text())
    assert config["arguments"]["max_length"] == 96 and config["arguments"]["beta"] == 0.3
    assert config["stages"]["dpo"]["max_steps"] == 2
    for name, default in {"learning_rate": 5e-4, "batch_size": 4, "eval_every": 100}.items():
        assert config["stages"]["dpo"][name] == default
    assert [r["step"] for r in metrics(out) if "eval_loss" in r] == [0, 2]
    # The same stage again, or one stage of a run that had them all, has the flags it had.
    shutil.rmtree(out / "dpo")
    command("--out", out, "--stage", "dpo")
    assert json.loads((out / "config.json").read_text())["arguments"]["max_steps"] == 2


def test_the_script_itself_refuses_in_one_line_with_status_2(tmp_path, model_folder):
    # As a user runs it, from another folder.
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--model", model_folder, "--data", "nothing.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing.jsonl") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_longer_than_max_length_is_dropped_and_counted(tmp_path, capsys, flags):
    rows = [GOOD | {"prompt": f"Is it {i}?"} for i in range(44)]
    rows[3]["prompt"] = "What? " * 200
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    held = write_rows(tmp_path / "held.jsonl", [GOOD] * 2)
    more = ["--data", path, "--eval-data", held, "--max-steps", 1, "--stage", "sft"]
    command(*flags, *more, "--out", tmp_path / "run")
    assert "training pairs: dropped 1 of 44 longer than 96 tokens" in capsys.readouterr().out


def test_half_precision_is_kept_out_of_adapters(tmp_path, flags):
    command(*flags, "--dtype", "bfloat16", "--max-steps", 1, "--out", tmp_path / "run")
    for adapter in ("sft", "dpo"):
        path = tmp_path / "run" / adapter / "adapter_model.safetensors"
        assert {t.dtype for t in open_safetensors(path).values()} == {torch.float32}


def test_without_quantizing_the_merged_model_is_the_base_plus_the_update(
    tmp_path, flags, model_folder
):
    out = tmp_path / "run"
    command(*flags, "--no-quantize", "--max-steps", 1, "--out", out)
    model = load_llama(model_folder, quantize=None)
    load_adapter(model, out / "dpo", "dpo")
    save_llama(model, tmp_path / "by_hand", torch.bfloat16)
    merged, by_hand = (load_llama(f, quantize=None) for f in (out / "merged", tmp_path / "by_hand"))
    tokens = torch.arange(3, 40)[None]
    torch.testing.assert_close(merged(tokens), by_hand(tokens), rtol=0, atol=1e-5)
    assert isinstance(merged, Llama)
