"""DPO without SFT, on somebody's SFT, on another run's SFT; and settings by name."""

import io
import json
import shutil

import pytest
import torch
from test_train import STEPS, command, metrics, preference_rows, refuse, write_rows

from dpo_minimal import InputError, reference
from dpo_minimal.batches import pair_batch
from dpo_minimal.checkpoint import load_adapter, load_llama, save_adapter
from dpo_minimal.data import encode_pairs, load_splits
from dpo_minimal.extras.flags import make_parser
from dpo_minimal.extras.presets import PRESETS, stage_settings
from dpo_minimal.extras.reuse import FIXED
from dpo_minimal.files import read_sealed
from dpo_minimal.formats.huggingface import parse_config
from dpo_minimal.lora import adapter_names, add_adapter, lora_layers
from dpo_minimal.loss import preference_logps
from dpo_minimal.tokenizer import load_tokenizer

LN2 = 0.6931471805599453


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 44 preference pairs."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", preference_rows())


@pytest.fixture(scope="module")
def flags(model_folder, data):
    """A small run."""
    return ["--model", model_folder, "--data", data, *STEPS]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, flags):
    """The folder of that run."""
    out = tmp_path_factory.mktemp("runs") / "first"
    command(*flags, "--out", out)
    return out


def dpo_steps(out):
    """The rows of the steps of DPO."""
    return [row for row in metrics(out) if row["stage"] == "dpo" and "loss" in row]


# Without SFT.


@pytest.fixture(scope="module")
def bare_run(tmp_path_factory, flags):
    """The folder of a run without SFT."""
    out = tmp_path_factory.mktemp("runs") / "bare"
    command(*flags, "--no-sft", "--out", out)
    return out


def test_without_sft_the_reference_is_the_base_itself(bare_run, model_folder, data):
    first = dpo_steps(bare_run)[0]
    assert abs(first["loss"] - LN2) <= 2**-25 and first["rewards/margins"] == 0
    assert not (bare_run / "sft").exists() and {r["stage"] for r in metrics(bare_run)} == {"dpo"}
    # the logged log-probabilities of step 0 are the base's own, by a model without any adapter
    model, tokenizer = load_llama(model_folder), load_tokenizer(model_folder)
    held_out = encode_pairs(tokenizer, load_splits(data).evaluation, 96, "pairs", print)
    batch = pair_batch(held_out, list(range(len(held_out))), "cpu")
    with torch.no_grad():
        chosen, _ = preference_logps(model, batch)
    zero = next(r for r in metrics(bare_run) if r.get("eval_rewards/margins") == 0)
    assert zero["eval_logps/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-5)


def test_without_sft_nothing_of_sft_is_reported_or_saved(bare_run):
    table = json.loads((bare_run / "eval.json").read_text())["table"]
    assert list(table) == ["base", "DPO"] and set(table["base"]) == {"kl_to_base"}
    assert table["base"]["kl_to_base"] == 0 != table["DPO"]["kl_to_base"]
    config = json.loads((bare_run / "dpo" / "adapter_config.json").read_text())
    assert config["r"] == 8  # one adapter, not two stacked ones


def test_the_reference_is_all_but_the_adapter_dpo(model_folder):
    model = load_llama(model_folder)
    seen = []
    model_names = {(): [], ("sft",): ["sft"], ("a", "b"): ["a", "b"]}
    for names, expected in model_names.items():
        for name in (*names, "dpo"):
            add_adapter(model, name, r=2)
        with pytest.MonkeyPatch.context() as patch:
            layers = lora_layers(model).values()
            patch.setattr(
                reference, "batch_logps", lambda m, b, ls=layers: seen.append(next(iter(ls)).active)
            )
            reference.reference_logps(model, None)
        assert list(seen[-1]) == expected
        model = load_llama(model_folder)


# On somebody's SFT.


def test_dpo_on_an_adapter_of_somebody_else(tmp_path, model_folder, flags):
    torch.manual_seed(3)
    model = load_llama(model_folder)
    add_adapter(model, "theirs", r=3, alpha=12, targets="q_proj,down_proj")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.1)
    save_adapter(model, ["theirs"], tmp_path / "theirs")
    command(*flags, "--sft-adapter", tmp_path / "theirs", "--out", tmp_path / "run")
    assert {row["stage"] for row in metrics(tmp_path / "run")} == {"dpo"}
    assert abs(dpo_steps(tmp_path / "run")[0]["loss"] - LN2) <= 2**-25
    # the run's sft/ is that adapter, and dpo/ holds both: 3 + 8
    ours, theirs = load_llama(model_folder), load_llama(model_folder)
    load_adapter(ours, tmp_path / "run" / "sft", "sft")
    load_adapter(theirs, tmp_path / "theirs", "sft")
    tokens = torch.tensor([[1, 5, 9, 7]])
    assert torch.equal(ours(tokens), theirs(tokens))
    config = json.loads((tmp_path / "run" / "dpo" / "adapter_config.json").read_text())
    assert config["r"] == 11 and config["target_modules"] == ["down_proj", "q_proj", "v_proj"]


# On another run's SFT.


def test_beta_alone_changes_and_nothing_else_is_computed_again(
    tmp_path, first_run, monkeypatch, data
):
    computed, right = [], reference.reference_logps

    def count(model, batch):
        computed.extend(batch.indices)
        return right(model, batch)

    monkeypatch.setattr(reference, "reference_logps", count)
    out = tmp_path / "again"
    command("--reuse", first_run, "--beta", 0.5, "--out", out)
    assert computed == [] and {row["stage"] for row in metrics(out)} == {"dpo"}
    for path in (first_run / "sft").iterdir():
        assert path.read_bytes() == (out / "sft" / path.name).read_bytes()
    before, after = dpo_steps(first_run), dpo_steps(out)
    assert before[0]["loss"] == after[0]["loss"] and after[0]["learning_rate"] > 0
    assert before[1]["rewards/margins"] != after[1]["rewards/margins"]
    assert [r["logps/chosen"] for r in before][0] == [r["logps/chosen"] for r in after][0]
    assert json.loads((out / "config.json").read_text())["arguments"]["beta"] == 0.5
    assert (out / "merged").exists()


def test_the_same_settings_give_the_same_run(tmp_path, first_run):
    command("--reuse", first_run, "--out", tmp_path / "again")
    for file in ("dpo/adapter_model.safetensors", "samples.md", "merged/model.safetensors"):
        assert (first_run / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert dpo_steps(first_run) == dpo_steps(tmp_path / "again")


def test_what_sft_depends_on_cannot_change(tmp_path, first_run, capsys, data):
    changes = {"seed": 7, "max_length": 80, "dtype": "bfloat16", "model": "elsewhere"}
    assert changes.keys() <= set(FIXED)
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        err = refuse(capsys, "--reuse", first_run, flag, value, "--out", tmp_path / "again")
        assert flag in err and "cannot change" in err
    assert "no run" in refuse(capsys, "--reuse", tmp_path, "--out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_flags_that_an_older_version_did_not_have_are_its_defaults(tmp_path, first_run, capsys):
    shutil.copytree(first_run, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    record = json.loads(path.read_text())
    for name in ("template", "template_digest", "chat_template", "no_sft", "sft_adapter", "reuse"):
        del record["arguments"][name]
    path.write_text(json.dumps(record))
    again = ["--reuse", tmp_path / "old", "--out", tmp_path / "again"]
    err = refuse(capsys, *again, "--no-sft")
    assert "--no-sft was False there, and cannot change" in err
    assert "--template was qa there" in refuse(capsys, *again, "--template", "chat")
    command(*again, "--template", "qa", "--stage", "dpo")
    weights = "dpo/adapter_model.safetensors"
    assert (first_run / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def test_changed_data_are_noticed(tmp_path, model_folder, capsys):
    rows, path = preference_rows(), tmp_path / "pairs.jsonl"
    write_rows(path, rows)
    command("--model", model_folder, "--data", path, *STEPS, "--out", tmp_path / "first")
    write_rows(path, rows[::-1])
    capsys.readouterr()
    err = refuse(capsys, "--reuse", tmp_path / "first", "--out", tmp_path / "again")
    assert "the data changed since that run" in err


def test_a_reuse_that_was_cut_off_is_resumed(tmp_path, first_run):
    out = tmp_path / "again"
    command("--reuse", first_run, "--out", out)
    for name in ("sft", "dpo", "merged"):
        shutil.rmtree(out / name)
    command("--resume", "--out", out)
    for file in ("dpo/adapter_model.safetensors", "merged/model.safetensors"):
        assert (first_run / file).read_bytes() == (out / file).read_bytes()


def test_kept_values_are_finite_and_of_every_pair_that_was_seen(first_run):
    (path,) = first_run.glob("reference-*.pt")
    tables = torch.load(io.BytesIO(read_sealed(path)), weights_only=True)
    assert tables["held-out"].isfinite().all() and len(tables["held-out"]) == 16
    assert 0 < tables["training"].isfinite().all(dim=1).sum() <= 12  # 3 steps of 4 pairs


# Flags together, and settings by name.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--no-sft"], "go with --model"),
        (["--no-sft", "--sft-adapter", "x", "--model", "m"], "leave out --sft-adapter"),
        (["--no-sft", "--stage", "sft", "--model", "m"], "leave out"),
        (["--preset", "stack-llama-2"], "--preset stack-llama-2"),
        (["--eval-data", "x"], "--eval-data goes with --data"),
        (["--preset", "forum", "--model", "m", "--data", "d"], "--preset forum"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, capsys, words, said):
    assert said in refuse(capsys, *words, "--out", tmp_path / "run")


def test_the_blogs_own_numbers():
    """From the scripts sft_llama2.py and dpo_llama2.py in TRL, and the article's command."""
    words = ["--preset", "stack-llama-2", "--model", "m", "--data", "d"]
    args = make_parser("").parse_args(words)
    stages, flags = stage_settings(args), PRESETS["stack-llama-2"][0]
    sft, dpo = stages["sft"], stages["dpo"]
    assert (sft.learning_rate, sft.batch_size, sft.grad_accum, sft.max_steps) == (1e-4, 4, 2, 500)
    assert (dpo.learning_rate, dpo.batch_size, dpo.grad_accum, dpo.max_steps) == (5e-4, 4, 4, 1000)
    for stage in (sft, dpo):
        assert (stage.warmup_steps, stage.weight_decay) == (100, 0.05)
    assert (dpo.eval_every, dpo.save_every) == (100, 100)
    assert flags["beta"] == 0.1 and flags["max_length"] == 1024
    assert flags["target_modules"] == "q_proj,v_proj"
    assert (args.lora_r, args.lora_alpha, args.lora_dropout) == (8, 16, 0.05)
    changed = make_parser("").parse_args([*words, "--max-steps", "7"])
    assert stage_settings(changed)["dpo"].max_steps == 7  # a flag goes before a preset


def test_a_preset_keeps_its_batches_where_others_shrink_with_the_data(
    tmp_path, flags, capsys, model_folder, data
):
    usual = ["--model", model_folder, "--data", data, "--max-length", 96, "--max-steps", 1]
    command(*usual, "--preset", "stack-llama-2", "--stage", "sft", "--out", tmp_path / "a")
    command(*usual, "--stage", "sft", "--out", tmp_path / "b")
    said = capsys.readouterr().out
    assert "1 steps of 4 x 2 rows" in said and "1 steps of 1 rows" in said


# Mistral.

MISTRAL = {  # Mistral-7B-v0.3's config.json
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32768,
}


def test_mistral_without_a_sliding_window_is_a_llama():
    config = parse_config(MISTRAL)
    assert config.rope_theta == 1e6 and config.num_key_value_heads == 8 and config.head_dim == 128
    less = {key: value for key, value in MISTRAL.items() if key != "num_key_value_heads"}
    assert parse_config(less).num_key_value_heads == 8  # Mistral's default; Llama's is 32 here
    for window in (4096, "left out"):
        config = MISTRAL | {"sliding_window": window}
        if window == "left out":
            del config["sliding_window"]  # which means 4096
        with pytest.raises(InputError, match="sliding_window = 4096"):
            parse_config(config)


def test_adapter_names_are_in_order(model_folder):
    model = load_llama(model_folder)
    assert adapter_names(model) == []
    add_adapter(model, "b", r=1, targets="q_proj")
    add_adapter(model, "a", r=1, targets="v_proj")
    assert adapter_names(model) == ["b", "a"]
