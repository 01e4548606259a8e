"""Every evaluation computes what it prints, on the pairs that it names."""

import json
import re
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train import STEPS, command, metrics, preference_rows, write_rows

from dpo_minimal.batches import answer_rows
from dpo_minimal.checkpoint import load_adapter, load_llama, save_llama
from dpo_minimal.data import encode_pairs, load_pairs
from dpo_minimal.extras import ask, card, digest, report
from dpo_minimal.loss import sequence_logps
from dpo_minimal.tokenizer import load_tokenizer


@pytest.fixture(scope="module", autouse=True)
def no_answers():
    """Answers of untrained models are long, and nothing here is about them."""

    def compare(model, tokenizer, questions, **options):
        names = ["base", "SFT", "DPO"]
        return {name: {"kl_to_sft": 0.5} for name in names}, dict.fromkeys(names, ["Yes."] * 8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "compare", compare)
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
