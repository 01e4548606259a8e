"""DPO on rows of messages: TRL's own preparation of them and ten of its steps against ours.

TRL also scores what a template has behind the end-of-turn token, such as ChatML's line break; that
one token is cut from its rows here. Nothing else is changed: see test_trl.py for the trainers.
"""

import json

import pytest
import test_trl
from chat_templates import LLAMA3
from oracles import smollm2_folder, transformers_llama
from test_chat_oracle import llama3_folder
from test_trl import datasets, difference, our_model, train_ours, transformers, trl, trl_trainer

from dpo_minimal.data import encode_pairs, load_pairs
from dpo_minimal.tokenizer import load_tokenizer

STEPS, CLOSE = 10, 1e-4


def rows():
    """Rows as UltraFeedback has them; some have several turns, some a system message."""
    made = []
    for i in range(12):
        turns = [{"role": "user", "content": f"Why is the sky blue? Reason {i}."}]
        if i % 3 == 1:
            more = {"role": "assistant", "content": "Which reason?"}
            turns += [more, {"role": "user", "content": f"{i}\n\nplease"}]
        if i % 4 == 2:
            turns.insert(0, {"role": "system", "content": "Answer in one line."})
        first = next(turn["content"] for turn in turns if turn["role"] == "user")
        row = {"prompt": first, "score_chosen": 8.0}
        answers = {"chosen": "It is the air, " * (1 + i % 3), "rejected": f"No {i}.\nReally. " * 2}
        for name, text in answers.items():
            row[name] = [*turns, {"role": "assistant", "content": text.strip()}]
        made.append(row)
    return made


def trl_pairs(folder, template, prompts):
    """(prompt, chosen, rejected) ids of the rows as TRL prepares them, prompt inside the lists."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    rows = [{name: row[name] for name in ("chosen", "rejected")} for row in prompts]
    settings = test_trl.SimpleNamespace(dataset_num_proc=None, max_length=None)
    trainer = test_trl.SimpleNamespace(_tokenizer=tokenizer)
    prepared = trl.DPOTrainer._prepare_dataset(
        trainer, datasets.Dataset.from_list(rows), tokenizer, settings, "train"
    )
    return [[row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] for row in prepared]


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_ten_steps_on_messages_agree_with_trl(tmp_path, monkeypatch, name):
    if name == "smollm2":
        folder = smollm2_folder()
        template = (folder / "chat_template.jinja").read_text("utf-8")
    else:
        folder, template = llama3_folder(tmp_path), LLAMA3
        transformers_llama(folder, vocab_size=load_tokenizer(folder).vocab_size)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    tokenizer = load_tokenizer(folder, template)
    pairs = encode_pairs(tokenizer, load_pairs(tmp_path / "rows.jsonl"), 256, "pairs")
    theirs_ids = trl_pairs(folder, template, rows())
    behind = {"tiny": [], "smollm2": tokenizer.encode("\n")}[name]
    assert [[p, c + behind, r + behind] for p, c, r in pairs] == theirs_ids
    monkeypatch.setattr(test_trl, "STEPS", STEPS)
    settings = test_trl.replace(
        test_trl.SETTINGS, learning_rate=5e-4, batch_size=2, epochs=STEPS, max_steps=STEPS
    )
    monkeypatch.setattr(test_trl, "SETTINGS", settings)
    out = tmp_path / "trl"
    trainer = trl_trainer(folder, pairs, "sigmoid", 0.1, False, 1, out)
    model = our_model(folder, trainer, False)
    ours = train_ours(model, pairs, "sigmoid", 0.1, 1, tmp_path)
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(ours) == len(theirs) == STEPS
    for metric in ("loss", "rewards/margins"):
        far = difference(ours, theirs, metric)
        print(f"{name}: largest difference of {metric} {far:.1e}")
        assert far < CLOSE
    print([round(row["loss"], 5) for row in ours])
    assert abs(ours[0]["loss"] - 0.6931471805599453) < 1e-6 and ours[-1]["rewards/margins"] > 0
