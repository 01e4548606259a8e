"""Every evaluation computes what it prints, on the pairs that it names."""

import json
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train import STEPS, command, metrics, preference_rows, write_rows

from dpo_minimal import InputError
from dpo_minimal.batches import answer_rows
from dpo_minimal.checkpoint import load_adapter, load_llama, save_adapter, save_llama
from dpo_minimal.data import encode_pairs, load_pairs
from dpo_minimal.extras import ask, card, digest, measure, report
from dpo_minimal.extras.command_line import run_command
from dpo_minimal.extras.rounding import round_again
from dpo_minimal.formats.huggingface import open_weights
from dpo_minimal.generate import generate
from dpo_minimal.lora import add_adapter, lora_layers
from dpo_minimal.loss import sequence_logps
from dpo_minimal.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module", autouse=True)
def no_answers():
    """Answers of untrained models are long, and nothing here is about them, nor about curves."""

    def compare(model, tokenizer, questions, **options):
        names = ["base", "SFT", "DPO"]
        return {name: {"kl_to_sft": 0.5} for name in names}, dict.fromkeys(names, ["Yes."] * 8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "compare", compare)
        patch.setattr(report.plots, "draw_curves", lambda *places: None)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 44 preference pairs."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", preference_rows())


@pytest.fixture(scope="module")
def new_data(tmp_path_factory):
    """A file of 23 other ones: they are preferred the other way round."""
    rows = preference_rows(23)
    for row in rows:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return write_rows(tmp_path_factory.mktemp("data") / "new.jsonl", rows)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, model_folder, data):
    """The folder of a small run with a large rate, so that rewards are not tiny."""
    out = tmp_path_factory.mktemp("runs") / "first"
    flags = [*STEPS, "--target-modules", "all", "--learning-rate", 0.01]
    command("--model", model_folder, "--data", data, *flags, "--out", out)
    return out


def alone(folder, adapter, encoded):
    """log pi [n, 2] of both answers of each pair, in rows of their own, float64."""
    model = load_llama(folder)
    if adapter:
        load_adapter(model, adapter, "adapter")
    both = [[(p.prompt, p.chosen) for p in encoded], [(p.prompt, p.rejected) for p in encoded]]
    with torch.no_grad():
        logps = [sequence_logps(model, *answer_rows(answers, "cpu")) for answers in both]
    return torch.stack(logps, dim=1).double().numpy()


def by_hand(policy, ref, beta):
    """DPO's metrics in NumPy, from log-probabilities [n, 2]."""
    rewards = beta * (policy - ref)
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "loss": np.log1p(np.exp(-margins)).mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "logps/chosen": policy[:, 0].mean(),
        "logps/rejected": policy[:, 1].mean(),
    }


def test_an_evaluation_of_new_pairs_is_of_these_pairs(
    tmp_path, first_run, model_folder, new_data, capsys
):
    out = tmp_path / "run"
    shutil.copytree(first_run, out)
    shutil.rmtree(out / "merged")
    capsys.readouterr()
    command("--out", out, "--stage", "evaluate", "--eval-data", new_data)
    said = capsys.readouterr().out
    held_out = json.loads((out / "eval.json").read_text())["held_out"]
    tokenizer, texts = load_tokenizer(model_folder), load_pairs(new_data, log=str)
    encoded = encode_pairs(tokenizer, texts, 96, "", str)
    policy = alone(model_folder, out / "dpo", encoded)
    expected = by_hand(policy, alone(model_folder, out / "sft", encoded), beta=0.1)
    for name, value in expected.items():  # logps near -150, whose float32 are 1.5e-5 apart
        assert held_out[f"eval_{name}"] == pytest.approx(value, abs=1e-3 if "/" in name else 1e-4)
    assert abs(expected["rewards/margins"]) > 0.01  # so that zero would not pass
    assert held_out["pairs"] == str(new_data) and held_out["of"] == len(encoded) == 22
    assert held_out["tokens"] == sum(len(ids) for pair in encoded for ids in pair)
    assert held_out["texts_digest"] == digest.of_pairs(texts)
    accuracy = f"{expected['rewards/accuracies']:.3f}"
    assert f"held-out pairs (22 of {new_data}): reward accuracy {accuracy}" in said
    before = json.loads((first_run / "eval.json").read_text())["held_out"]
    assert abs(before["eval_rewards/margins"] - held_out["eval_rewards/margins"]) > 0.01


def test_on_the_same_pairs_it_is_what_training_measured_last(first_run):
    last = [row for row in metrics(first_run) if "eval_loss" in row][-1]
    held_out = json.loads((first_run / "eval.json").read_text())["held_out"]
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert held_out[name] == pytest.approx(last[name], abs=1e-5)


def test_the_digest_of_a_base_is_of_its_weights_and_not_of_its_files(
    tmp_path, model_folder, monkeypatch
):
    model = load_llama(model_folder, quantize=None)
    expected = digest.of_base(model_folder)
    with monkeypatch.context() as patch:
        patch.setattr("dpo_minimal.formats.huggingface.SHARD_BYTES", 20_000)
        save_llama(model, tmp_path / "shards", torch.float32)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert digest.of_base(tmp_path / "shards") == expected
    model.model.norm.weight.data[3] += 2**-20
    save_llama(model, tmp_path / "other", torch.float32)
    assert digest.of_base(tmp_path / "other") != expected
    weights = open_weights(model_folder)
    del weights["model.norm.weight"]
    monkeypatch.setattr(digest, "open_weights", lambda folder: weights)
    with pytest.raises(InputError, match="its weights lack model.norm.weight"):
        digest.of_base(model_folder)


def test_the_digest_of_pairs_is_of_every_text_and_of_the_order():
    pairs = [("a", "b", "c"), ("d", "e", "f")]
    others = [pairs[::-1], [("a", "b", "c"), ("d", "e", "g")], [("ab", "", "c"), pairs[1]]]
    assert len({digest.of_pairs(p) for p in [pairs, *others]}) == 4
    assert digest.of_pairs(list(map(list, pairs))) == digest.of_pairs(pairs)


# Model cards.


def front_matter(text):
    """The lines between the two --- at a card's top: {key: value or list}, for YAML as simple."""
    lines, fields = text.split("---\n")[1].splitlines(), {}
    for line in lines:
        if line.startswith("- "):
            fields[list(fields)[-1]].append(line[2:])
        else:
            key, _, value = line.partition(":")
            fields[key] = value.strip() or []
    return fields


def test_every_product_has_a_card_with_the_measured_numbers(first_run):
    held_out = json.loads((first_run / "eval.json").read_text())["held_out"]
    for product in ("sft", "dpo", "merged"):
        text = (first_run / product / "README.md").read_text("utf-8")
        fields = front_matter(text)
        adapter = product != "merged"
        assert fields["library_name"] == ("peft" if adapter else "transformers")
        assert fields["base_model"] == "tiny" and "\n# tiny, " in text
        assert ("dpo" in fields["tags"]) == (product != "sft") and (
            "lora" in fields["tags"]
        ) == adapter
        assert "pairs.jsonl: 27 training pairs" in text  # one of 28 is too long
        assert ("unquantized base it answers differently" in text) == adapter
        (code,) = re.findall("```python\n(.*?)```", text, re.S)
        compile(code, product, "exec")
        assert ("PeftModel" in code) == ("bnb_4bit_quant_type" in code) == adapter
        assert str(first_run) not in text and "/home" not in text  # names, not places
        if product != "sft":
            accuracy = held_out["eval_rewards/accuracies"]
            margin, loss = held_out["eval_rewards/margins"], held_out["eval_loss"]
            assert "16 pairs of pairs.jsonl" in text and "beta 0.1" in text
            assert f"accuracy {accuracy:.3f}, margin {margin:+.3f}, loss {loss:.4f}" in text
            rows = [r for r in metrics(first_run) if r["stage"] == "dpo" and "loss" in r]
            assert f"{rows[-1]['num_tokens']:,} tokens, learning rate up to 0.01" in text


def test_the_commands_of_cards_are_those_of_generate(first_run):
    for product in ("sft", "dpo", "merged"):
        text = (first_run / product / "README.md").read_text("utf-8")
        (line,) = re.findall(r"^python -m dpo_minimal.generate (.*)$", text, re.M)
        args = ask.make_parser().parse_args(shlex.split(line))
        assert (args.adapter is None) == (product == "merged") and args.prompt


def test_a_base_that_knows_its_name_on_the_hub_is_named_so(tmp_path):
    run = SimpleNamespace(model_folder=tmp_path, args=SimpleNamespace(model=tmp_path))
    for known, expected in (("org/Model-1.5", "org/Model-1.5"), ("/home/me/m", tmp_path.name)):
        (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": known}))
        assert card.base_name(run) == expected
    fields = front_matter(card.front_matter(run, "dpo", "org/Model-1.5") + "\n")
    assert fields["base_model"] == "org/Model-1.5"
    assert "base_model" not in front_matter(card.front_matter(run, "dpo", "my model") + "\n")


# The command on any model, adapter and pairs.


def evaluate(capsys, *flags):
    """(what `python -m dpo_minimal.evaluate` prints, its exit status, its errors)."""
    argv, sys.argv, status = sys.argv, ["evaluate", *map(str, flags)], 0
    capsys.readouterr()
    try:
        run_command(measure.main)
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
    said = capsys.readouterr()
    return said.out, status, said.err


def cells(printed, label):
    """The numbers of a row of a printed table."""
    (line,) = [line for line in printed.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_a_runs_adapter_on_new_pairs(capsys, first_run, model_folder, new_data):
    out, status, _ = evaluate(
        capsys, "--model", model_folder, "--adapter", first_run / "dpo", "--data", new_data
    )
    encoded = encode_pairs(load_tokenizer(model_folder), load_pairs(new_data, str), 96, "", str)
    policy = alone(model_folder, first_run / "dpo", encoded)
    ref = alone(model_folder, first_run / "sft", encoded)
    expected = by_hand(policy, ref, beta=0.1)
    assert status == 0 and f"22 pairs of {new_data}, beta 0.1" in out
    assert f"reference {first_run / 'sft'}" in out
    likelier, chosen, _, accuracy, margin, loss = map(float, cells(out, "dpo"))
    assert likelier == round((policy[:, 0] > policy[:, 1]).mean(), 3)
    assert chosen == pytest.approx(expected["logps/chosen"], abs=2e-3)
    assert accuracy == round(expected["rewards/accuracies"], 3)
    assert margin == pytest.approx(expected["rewards/margins"], abs=1e-4)
    assert loss == pytest.approx(expected["loss"], abs=1e-4)
    assert cells(out, "sft (reference)")[3:] == ["-", "-", "-"]
    assert float(cells(out, "base")[1]) == pytest.approx(
        alone(model_folder, None, encoded)[:, 0].mean(), abs=2e-3
    )


def test_the_reference_of_an_adapter_alone_is_the_base_and_flags_count(
    tmp_path, capsys, first_run, model_folder, new_data
):
    shutil.copytree(first_run / "dpo", tmp_path / "mine")
    flags = ["--model", model_folder, "--adapter", tmp_path / "mine", "--data", new_data]
    out, _, _ = evaluate(capsys, *flags, "--beta", 0.5, "--loss", "ipo", "--max-length", 96)
    encoded = encode_pairs(load_tokenizer(model_folder), load_pairs(new_data, str), 96, "", str)
    policy, ref = (alone(model_folder, a, encoded) for a in (tmp_path / "mine", None))
    delta = (policy - ref)[:, 0] - (policy - ref)[:, 1]
    assert float(cells(out, "mine")[4]) == pytest.approx(0.5 * delta.mean(), abs=2e-3)
    assert float(cells(out, "mine")[5]) == pytest.approx(((delta - 1) ** 2).mean(), rel=1e-3)


def test_a_model_without_an_adapter_has_another_model_as_its_reference(
    capsys, first_run, model_folder, new_data
):
    flags = ["--model", first_run / "merged", "--data", new_data]
    out, _, _ = evaluate(capsys, *flags)
    assert cells(out, "merged")[3:] == ["-", "-", "-"]
    out, _, _ = evaluate(capsys, *flags, "--reference", model_folder)
    assert float(cells(out, "merged")[4]) != 0
    out, _, _ = evaluate(capsys, *flags, "--reference", first_run / "merged")
    assert [float(x) for x in cells(out, "merged")[3:5]] == [0, 0]
    out, _, _ = evaluate(capsys, *flags, "--loss", "simpo", "--beta", 2)  # which needs none
    assert float(cells(out, "merged")[4]) != 0 and float(cells(out, "merged")[5]) > 0


def test_every_variant_answers_the_prompts(tmp_path, capsys, first_run, model_folder):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is a baby goat called?\n\nWhat is a young fox?\n", "utf-8")
    flags = ["--model", model_folder, "--adapter", first_run / "dpo", "--prompts", prompts]
    flags += ["--max-new-tokens", 3]
    out, status, _ = evaluate(capsys, *flags, "--out", tmp_path / "answers.md")
    text = (tmp_path / "answers.md").read_text("utf-8")
    assert status == 0 and "answers.md" in out
    assert text.count("### ") == 2 and "### What is a young fox?" in text
    for label in ("base", "sft (reference)", "dpo"):
        assert text.count(f"- **{label}**: ") == 2
    model, tokenizer = load_llama(model_folder), load_tokenizer(model_folder)
    load_adapter(model, first_run / "dpo", "dpo")
    answer = generate(model, tokenizer, "What is a young fox?", 3, temperature=0)
    assert f"- **dpo**: {answer}" in text
    assert f"- **dpo**: {answer}" in evaluate(capsys, *flags)[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --model and --data or --prompts, or --verify RUN"),
        (["--model", "m"], "give --model and --data or --prompts, or --verify RUN"),
        (["--model", "m", "--prompts", "nowhere.txt"], "m: no tokenizer"),
        (["--verify", "nowhere"], "no such run's folder"),
        (["--verify", "."], "it has no config.json"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    _, status, err = evaluate(capsys, *words)
    assert status == 2 and said in err and err.count("\n") == 1


# The passport.


def verdicts(printed):
    """{what: verdict} of a printed passport."""
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:1] == "|"]
    return {row[0]: row[-1] for row in rows[2:]}


@pytest.fixture(scope="module")
def other_folders(tmp_path_factory, first_run, model_folder):
    """What may be taken for a run's own: a base, an adapter, merged folders."""
    folder = tmp_path_factory.mktemp("other")
    model = load_llama(model_folder, quantize=None)
    for parameter in model.parameters():
        parameter.data *= 1.02
    save_llama(model, folder / "base", torch.float32, tokenizer_from=model_folder)
    # DPO's part alone: the stacked adapter without the first 8 rows of A, the first 8 columns of B
    model = load_llama(model_folder)
    load_adapter(model, first_run / "dpo", "both")
    add_adapter(model, "dpo", r=8, alpha=8, targets="all")
    for layer in lora_layers(model).values():
        layer.adapters["dpo"].lora_A.data = layer.adapters["both"].lora_A.data[8:].clone()
        layer.adapters["dpo"].lora_B.data = layer.adapters["both"].lora_B.data[:, 8:].clone()
    save_adapter(model, ["dpo"], folder / "dpo_alone")
    shutil.copytree(first_run / "merged", folder / "merged_mute")
    (folder / "merged_mute" / "tokenizer.model").unlink()
    # what PEFT's merge_and_unload makes of the adapter over the unquantized base
    model = load_llama(model_folder, quantize=None)
    load_adapter(model, first_run / "dpo", "dpo")
    save_llama(model, folder / "merged_unquantized", tokenizer_from=model_folder)
    shutil.copytree(first_run / "merged", folder / "merged_tokenizer")
    texts = [row["chosen"] for row in preference_rows(40)]
    train_tokenizer(texts * 3, 320, folder / "merged_tokenizer" / "tokenizer.model")
    return folder


def test_a_tokenizer_larger_than_the_model_is_refused(capsys, tmp_path, model_folder, data):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    texts = [row["chosen"] for row in preference_rows(40)] * 9
    train_tokenizer(texts, 430, folder / "tokenizer.model")
    _, status, err = evaluate(capsys, "--model", folder, "--data", data)
    assert status == 2 and "last id is 429, but the model's vocabulary has 420 entries" in err


def test_the_passport_of_a_run_passes(capsys, first_run):
    out, status, _ = evaluate(capsys, "--verify", first_run)
    assert status == 0 and "passed" in out and set(verdicts(out).values()) == {"ok"}
    assert len(verdicts(out)) == 6 + 2 * 5 + 1
    # The tolerance of merged/ is not so wide that anything would do.
    held_out = json.loads((first_run / "eval.json").read_text())["held_out"]
    (line,) = [line for line in out.splitlines() if "merged rewards/margins" in line]
    assert float(line.split(" | ")[-2]) < 0.3 * abs(held_out["eval_rewards/margins"])


FAILS = {  # case: (flags, what is said, rows that fail, rows that pass)
    "base": (["--model", "base"], "wrong base", ["base", "adapter logps/chosen"], ["pairs"]),
    "unquantized": (
        ["--no-quantize"],
        "the base is unquantized: the adapter was trained over it in 4 bits",
        ["base is", "adapter logps/chosen", "adapter logps/rejected"],
        ["base", "merged logps/chosen"],
    ),
    "no SFT": (
        ["--adapter", "dpo_alone"],
        "an adapter without the SFT",
        ["adapter has SFT", "adapter logps/chosen"],
        ["base", "merged rewards/margins"],
    ),
    "tokenizer": (
        ["--merged", "merged_tokenizer"],
        "another tokenizer or template",
        ["merged's tokens"],
        ["base's tokens", "adapter loss"],
    ),
    "no tokenizer": (
        ["--merged", "merged_mute"],
        "another tokenizer or template",
        ["merged's tokens"],
        ["base's tokens", "adapter loss"],
    ),
    "merged": (
        ["--merged", "merged_unquantized"],
        "other weights than those that the run was evaluated with",
        ["merged logps/chosen", "merged from adapter, rms"],
        ["merged's tokens", "adapter loss"],
    ),
}


@pytest.mark.parametrize("case", FAILS)
def test_the_passport_fails_and_says_why(capsys, first_run, other_folders, case):
    flags, said, fail, passed = FAILS[case]
    flags = [word if word.startswith("-") else other_folders / word for word in flags]
    out, status, _ = evaluate(capsys, "--verify", first_run, *flags)
    rows = verdicts(out)
    (reason,) = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert status == 1 and said in reason and "passed" not in out
    assert {rows[name] for name in fail} == {"FAIL"} and {rows[name] for name in passed} == {"ok"}


def test_other_pairs_are_named(capsys, first_run, new_data):
    out, status, _ = evaluate(capsys, "--verify", first_run, "--data", new_data)
    assert status == 1 and "FAIL      other pairs than those" in out


def test_the_passports_of_a_run_without_sft_and_of_one_on_somebodys_adapter(
    tmp_path, capsys, first_run, model_folder, data
):
    flags = ["--model", model_folder, "--data", data, *STEPS, "--learning-rate", 0.01]
    for name, words in (("bare", ["--no-sft"]), ("theirs", ["--sft-adapter", first_run / "sft"])):
        command(*flags, *words, "--out", tmp_path / name)
        out, status, _ = evaluate(capsys, "--verify", tmp_path / name)
        assert status == 0 and set(verdicts(out).values()) == {"ok"}, out
    out, status, _ = evaluate(capsys, "--verify", tmp_path / "bare", "--no-quantize")
    assert status == 1 and verdicts(out)["base"] == "ok" != verdicts(out)["base is"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_rounding_is_as_strong_as_rounding(dtype):
    torch.manual_seed(0)
    exact = torch.randn(400, 501)
    exact[:, 500] = 0  # a code of NF4: rounding left it as it is
    layer = torch.nn.Linear(501, 400, bias=False).to(dtype)
    layer.weight.data = exact.bfloat16().to(dtype)
    before = layer.weight.detach().double()
    round_again(layer)
    after = layer.weight.detach()
    assert torch.equal(after, after.bfloat16().to(dtype))
    assert (after[:, 500] == 0).all()
    exact, before, after = exact[:, :500], before[:, :500], after[:, :500]
    step = 2.0 ** (exact.double().abs().log2().floor() - 7)  # 8 bits, the first one implied
    ours, real = ((after.double() - before) / step, (exact.double() - before) / step)
    # 200,000 of them: 1/12 within 2%, and half of them upwards
    assert ours.square().mean().item() == pytest.approx(1 / 12, rel=0.02)
    assert real.square().mean().item() == pytest.approx(1 / 12, rel=0.02)
    assert abs(ours.mean().item()) < 0.003
