"""Files to pairs, pairs to token ids, token ids to batches, and the order of the batches."""

import ast
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import SHAPE, batch_order, tiny_llama

from dpo_minimal import InputError, batches
from dpo_minimal.batches import (
    answer_rows,
    pack,
    packed_batch,
    packed_order,
    packed_rows,
    pair_batch,
    pair_order,
    pair_rows,
)
from dpo_minimal.data import (
    EncodedPair,
    PreferencePair,
    Subset,
    encode_example,
    encode_pair,
    encode_pairs,
    encode_sft,
    format_prompt,
    load_pairs,
    load_splits,
    without_repeats,
)
from dpo_minimal.llama import Llama, LlamaConfig
from dpo_minimal.loss import preference_logps, sequence_logps, token_logps

PLAIN = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}
PAIR = PreferencePair("Is it?", "Yes.", "No.")
# Beginnings of an answer that a tokenizer could merge with "Answer:" or lose.
NASTY = ['"Quoted"', "\nNext line", "\n\n", "42", "你好", "😀", ":", ":)", "- item", " two", "\tx"]


class ByteTokenizer:
    """Ids are bytes + 3: nothing merges, and texts have lengths that one can count."""

    bos_id, eos_id, vocab_size = 1, 2, 259

    def encode(self, text, bos=False, eos=False):
        return [1] * bos + [byte + 3 for byte in text.encode()] + [2] * eos

    def decode(self, ids):
        return bytes(i - 3 for i in ids if i > 2).decode()


def quiet(text):
    """A log that nobody reads."""


def write_rows(path, rows):
    """Rows as JSON Lines; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def plain_rows(n, prefix="q"):
    """n different rows of n different questions."""
    return [{"prompt": f"{prefix}{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(n)]


# Files to pairs.


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("array", [False, True])
def test_json_lines_and_arrays_also_gzipped_give_the_same_pairs(tmp_path, array, zipped):
    rows = [PLAIN, PLAIN | {"prompt": "Ünïcode 😀?"}]
    text = json.dumps(rows, indent=1) if array else "\n\n".join(map(json.dumps, rows)) + "\n"
    path = tmp_path / ("pairs.json" + ".gz" * zipped)
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    assert list(load_pairs(path, quiet)) == [PAIR, PAIR._replace(prompt="Ünïcode 😀?")]


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (PLAIN, PAIR),
        ({"qid": 1, "question": "Is it?", "response_j": "Yes.", "response_k": "No."}, PAIR),
        ({"instruction": "Is it?", "input": "", "output": "x", **PLAIN}, PAIR),
        (
            {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"},
            PreferencePair("Add.\n1 and 2", "3", "4"),
        ),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!",
                "rejected": "\n\nHuman: Hi\n\nAssistant: What?",
            },
            PreferencePair("Hi", "Hello!", "What?"),
        ),
        (
            {  # both last answers begin alike: the split is at the turn, not at the difference
                "chosen": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: Do it.",
                "rejected": "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: Do not.",
            },
            PreferencePair("A\n\nAssistant: B\n\nHuman: C", "Do it.", "Do not."),
        ),
    ],
    ids=["plain", "stack-exchange", "instruction", "instruction+input", "dialogue", "multi-turn"],
)
def test_the_usual_forms_of_a_row_are_understood(tmp_path, row, pair):
    assert list(load_pairs(write_rows(tmp_path / "pairs.jsonl", [row]), quiet)) == [pair]


@pytest.mark.parametrize("end", ["\n\nAnswer:", "\n\nAnswer: "])
def test_a_prompt_in_the_template_already_is_not_put_into_it_twice(tmp_path, end):
    row = PLAIN | {"prompt": f"Question: Is it?{end}"}
    (pair,) = load_pairs(write_rows(tmp_path / "pairs.jsonl", [row]), quiet)
    assert format_prompt(pair.prompt) == "Question: Is it?\n\nAnswer:"


@pytest.mark.parametrize(
    ("name", "zipped"), [("pairs.jsonl", True), ("pairs.json.gz", False), ("pairs.jsonl.gz", False)]
)
def test_what_a_file_holds_counts_and_not_its_name(tmp_path, name, zipped):
    text = json.dumps(PLAIN).encode() + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(text) if zipped else text)
    assert load_pairs(tmp_path / name, quiet) == [PAIR]
    assert load_pairs(tmp_path, quiet) == [PAIR]


def test_the_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    # Created in another order, and so many of them that no file system lists them right by chance.
    letters = list("abcdefghijklmnopqrst")
    for letter in random.Random(0).sample(letters, len(letters)):
        suffix = "json" if letter < "k" else "jsonl"
        write_rows(tmp_path / f"{letter}.{suffix}", plain_rows(2, letter))
    (tmp_path / "readme.md").write_text("not data")
    expected = [f"{letter}{i}" for letter in letters for i in range(2)]
    assert [pair.prompt for pair in load_pairs(tmp_path, quiet)] == expected


def test_rows_of_a_parquet_file_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([PLAIN]), tmp_path / "pairs.parquet")
    assert list(load_pairs(tmp_path, quiet)) == [PAIR]


def test_dropped_pairs_are_counted_and_the_first_place_is_named(tmp_path):
    same, empty = PLAIN | {"rejected": "Yes."}, PLAIN | {"chosen": " \n"}
    path = write_rows(tmp_path / "pairs.jsonl", [PLAIN, same, empty, PLAIN, same])
    said = []
    assert list(load_pairs(path, said.append)) == [PAIR, PAIR]
    assert sorted(said) == [
        f"{path}: dropped 1 with an empty answer, the first at {path}, line 3",
        f"{path}: dropped 2 with chosen = rejected, the first at {path}, line 2",
    ]


@pytest.mark.parametrize("answer", ["chosen", "rejected"])
@pytest.mark.parametrize("text", ["", " \n\t"])
def test_a_pair_with_an_empty_answer_is_dropped_whichever_it_is(tmp_path, answer, text):
    path = write_rows(tmp_path / "pairs.jsonl", [PLAIN | {answer: text}, PLAIN])
    said = []
    assert load_pairs(path, said.append) == [PAIR]
    assert said == [f"{path}: dropped 1 with an empty answer, the first at {path}, line 1"]


@pytest.mark.parametrize(
    "bad", ['{"prompt": "Is it?", "chosen": }', '{"prompt": "Is', '{"prompt":']
)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, name, bad):
    good = json.dumps(PLAIN)
    lines = [good, bad, good] if name == "pairs.jsonl" else ["[", f"{good},", bad, ",", good, "]"]
    path = tmp_path / name
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match="broken JSON") as caught:
        load_pairs(path, quiet)
    # In an array a value that is cut off is missed where the next line begins with something else.
    number = lines.index(bad) + 1
    numbers = [number] if name == "pairs.jsonl" else [number, number + 1]
    places = [f"{path}, line {n}" for n in numbers]
    assert ", ".join(str(caught.value).split(", ")[:2]) in places


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        (PLAIN | {"chosen": ["b"]}, "'chosen' is list, not text"),
        ({"text": "a"}, "'prompt' is missing"),
        ("just text", "expected an object"),
        ({"chosen": "one", "rejected": "two"}, "no prompt"),
    ],
)
def test_a_row_of_no_known_form_is_named(tmp_path, row, said):
    path = write_rows(tmp_path / "pairs.jsonl", [PLAIN, row])
    with pytest.raises(InputError, match=said) as caught:
        load_pairs(path, quiet)
    assert f"{path}, line 2" in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    ["missing", "empty", "blank", "not text", "half a gzip", "damaged gzip", "empty folder"],
)
def test_a_file_that_cannot_be_read_is_an_input_error_of_one_line(tmp_path, damage):
    path = tmp_path / "pairs.jsonl"
    zipped = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in plain_rows(500)))
    content = {
        "empty": b"",
        "blank": b" \n\n",
        "not text": b'{"prompt": "\xff\xfe"}',
        "half a gzip": zipped[: len(zipped) // 2],
        "damaged gzip": zipped[:200] + bytes(200) + zipped[400:],
    }
    if damage == "empty folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(content[damage])
    with pytest.raises(InputError) as caught:
        load_pairs(path, quiet)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_in_which_every_pair_is_useless_says_why(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [PLAIN | {"rejected": "Yes."}] * 3)
    with pytest.raises(InputError, match="no usable preference pair.*3 with chosen = rejected"):
        load_pairs(path, quiet)


# Parts: what SFT, DPO and the evaluation get.


@pytest.mark.parametrize("inner", ["", "data"])
def test_the_parts_of_a_stack_exchange_folder_go_to_their_stages(tmp_path, inner):
    for part in ("finetune", "rl", "evaluation", "reward"):
        write_rows(tmp_path / inner / part / "rows.json", plain_rows(3, part))
    splits = load_splits(tmp_path, log=quiet)
    assert [pair[:2] for pair in splits.sft] == [(f"finetune{i}", f"good {i}") for i in range(3)]
    assert [pair.prompt for pair in splits.train] == ["rl0", "rl1", "rl2"]
    assert [pair.prompt for pair in splits.evaluation] == [f"evaluation{i}" for i in range(3)]


def test_without_a_part_for_sft_it_learns_the_chosen_answers_of_training_each_once(tmp_path):
    rows = plain_rows(2) + [{"prompt": "q0", "chosen": "good 0", "rejected": "other"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    held = write_rows(tmp_path / "held.jsonl", plain_rows(1, "held"))
    splits = load_splits(path, held, log=quiet)
    assert [pair[:2] for pair in splits.sft] == [("q0", "good 0"), ("q1", "good 1")]
    assert [pair.rejected for pair in splits.train] == ["bad", "bad", "other"]
    assert list(splits.evaluation) == [PreferencePair("held0", "good 0", "bad")]


def test_a_part_for_sft_loses_the_questions_that_are_held_out(tmp_path):
    for part in ("train_sft", "train_prefs"):  # UltraFeedback's names; the questions are the same
        write_rows(tmp_path / f"{part}.jsonl", plain_rows(40))
    splits = load_splits(tmp_path, log=quiet)
    held = {pair.prompt for pair in splits.evaluation}
    assert len(held) == 16 and len(splits.sft) == 24
    assert held & {pair.prompt for pair in splits.sft} == set()


def test_equal_answers_to_different_questions_both_stay_in_sft():
    pairs = [
        PreferencePair("a", "Yes.", "No."),
        PreferencePair("b", "Yes.", "No."),
        PreferencePair("a", "No.", "Yes."),
        PreferencePair("a", "Yes.", "Maybe."),  # for SFT the same as the first
    ]
    assert list(without_repeats(pairs, ())) == pairs[:3]
    assert list(without_repeats(pairs, [pairs[2]])) == pairs[1:2]  # none of its question


def test_a_subset_reads_the_pairs_of_its_indices():
    pairs = [PreferencePair(f"q{i}", "Yes.", "No.") for i in range(10)]
    some = Subset(pairs, [7, 2, 5])
    assert len(some) == 3 and list(some) == [pairs[7], pairs[2], pairs[5]]
    assert some[-1] == pairs[5]
    assert pairs[7] in some and pairs[3] not in some
    with pytest.raises(IndexError):
        some[3]


@pytest.mark.parametrize(("n", "wanted"), [(40, 16), (320, 16), (1000, 50)])
def test_five_percent_but_at_least_16_pairs_are_held_out(tmp_path, n, wanted):
    splits = load_splits(write_rows(tmp_path / "rows.jsonl", plain_rows(n)), log=quiet)
    assert len(splits.evaluation) == wanted and len(splits.train) == n - wanted
    assert len(splits.sft) == n - wanted


def test_no_held_out_question_is_trained_on(tmp_path):
    # 200 questions with 1 to 5 pairs each, in mixed order: splitting pairs would leak questions
    rows = [PLAIN | {"prompt": f"q{i}", "chosen": f"{k}"} for i in range(200) for k in range(i % 5)]
    random.Random(0).shuffle(rows)
    splits = load_splits(write_rows(tmp_path / "rows.jsonl", rows), log=quiet)
    held = {pair.prompt for pair in splits.evaluation}
    assert held & {pair.prompt for pair in splits.train} == set()
    assert held & {pair.prompt for pair in splits.sft} == set()
    assert 20 <= len(splits.evaluation) < 20 + 4  # 5% of 400, up to the end of a question
    assert len(splits.evaluation) + len(splits.train) == len(rows)


def test_what_is_held_out_depends_on_the_seed_alone(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", plain_rows(400))
    first, again = (load_splits(path, seed=1, log=quiet) for _ in range(2))
    other = load_splits(path, seed=2, log=quiet)
    assert list(map(list, first)) == list(map(list, again))
    assert set(first.evaluation) != set(other.evaluation)
    assert set(first.evaluation) != set(load_pairs(path, quiet)[-20:])  # and it is a random part


def test_splits_are_the_same_in_every_process(tmp_path):
    # Python's hashes of texts differ by process, and a resumed run must find the same pairs.
    path = write_rows(tmp_path / "rows.jsonl", plain_rows(400) + plain_rows(40))
    here = load_splits(path, seed=1, log=quiet)
    program = f"""
from dpo_minimal.data import load_splits
splits = load_splits({str(path)!r}, seed=1)
print([list(map(tuple, pairs)) for pairs in splits])
"""
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert ast.literal_eval(done.stdout) == [list(map(tuple, pairs)) for pairs in here]


def test_too_few_pairs_to_hold_any_out_are_refused(tmp_path):
    with pytest.raises(InputError, match="--eval-data"):
        load_splits(write_rows(tmp_path / "rows.jsonl", plain_rows(10)), log=quiet)


# Pairs to token ids.


def test_an_encoded_pair_is_the_template_with_one_bos_and_one_eos():
    pair = encode_pair(ByteTokenizer(), PAIR, 100)

    def ids(text):
        return [byte + 3 for byte in text]

    prompt = [1, *ids(b"Question: Is it?\n\nAnswer:")]
    assert pair == EncodedPair(prompt, [*ids(b" Yes."), 2], [*ids(b" No."), 2])


def check_rows(tokenizer, answers):
    """BOS once and first, EOS once and last of what is scored, prompt first, and all text kept."""
    question = 'What does "it"\nmean? 你好 😀 42'
    for answer in answers:
        pair = encode_pair(tokenizer, PreferencePair(question, answer, "No."), 10_000)
        joint = pair.prompt + pair.chosen
        assert joint.count(tokenizer.bos_id) == 1 and joint[0] == tokenizer.bos_id
        assert joint.count(tokenizer.eos_id) == 1 and joint[-1] == tokenizer.eos_id
        # The prompt of generation, tokenized on its own, is what the joint text begins with.
        assert pair.prompt == tokenizer.encode(format_prompt(question), bos=True)
        text = f"{format_prompt(question)} {answer}"
        assert joint == tokenizer.encode(text, bos=True, eos=True)
        assert tokenizer.decode(joint) == text
        batch = pair_batch([pair], [0], "cpu")
        scored = batch.tokens[0][batch.loss_mask[0] & ~batch.rejected[0]].tolist()
        assert scored == pair.chosen and scored[-1] == tokenizer.eos_id


def test_joint_tokens_begin_with_the_prompt_whatever_the_answer_begins_with(tokenizer):
    check_rows(tokenizer, NASTY)


def test_joint_tokens_begin_with_the_prompt_on_the_tokenizer_of_llama_2(llama2_tokenizer):
    check_rows(llama2_tokenizer, NASTY)


def test_every_real_pair_is_encoded_on_the_tokenizer_of_llama_2(llama2_tokenizer, real_preferences):
    for pair in load_pairs(real_preferences, quiet):
        encoded = encode_pair(llama2_tokenizer, pair, 4096)
        text = llama2_tokenizer.decode(encoded.prompt + encoded.rejected)
        assert text == f"{format_prompt(pair.prompt)} {pair.rejected}"
        assert encoded.prompt == llama2_tokenizer.encode(format_prompt(pair.prompt), bos=True)


def test_a_tokenizer_that_merges_over_the_boundary_is_refused():
    class Merging(ByteTokenizer):
        def encode(self, text, bos=False, eos=False):
            return super().encode(text.replace(": ", ";"), bos, eos)

    with pytest.raises(InputError, match="merges"):
        encode_example(Merging(), "Is it?", "Yes.")


def test_a_pair_too_long_is_dropped_and_never_cut():
    # BOS + 25 bytes of prompt, " Yes." and " No.", EOS
    assert len(b"Question: Is it?\n\nAnswer:") == 25
    encoded = encode_pair(ByteTokenizer(), PAIR, 32)
    assert len(encoded.prompt) + len(encoded.chosen) == 1 + 25 + 5 + 1 == 32
    assert encode_pair(ByteTokenizer(), PAIR, 31) is None
    swapped = PreferencePair(PAIR.prompt, PAIR.rejected, PAIR.chosen)
    assert encode_pair(ByteTokenizer(), swapped, 31) is None  # the longer answer decides


def test_dropped_rows_are_counted_and_the_rest_keeps_its_order_and_its_ends():
    long = PreferencePair("Is it?", "Yes, it is.", "No.")
    said = []
    kept = encode_pairs(ByteTokenizer(), [PAIR, long, PAIR], 32, "pairs", said.append)
    assert kept == [encode_pair(ByteTokenizer(), PAIR, 32)] * 2
    assert said == ["pairs: dropped 1 of 3 longer than 32 tokens"]
    # Whatever the rejected answer is: SFT does not read it.
    texts = [
        PreferencePair("Is it?", answer, "x" * 99) for answer in ("Yes.", "Yes, it is.", "No.")
    ]
    sft = encode_sft(ByteTokenizer(), texts, 32, said.append)
    assert [ByteTokenizer().decode(answer) for _, answer in sft] == [" Yes.", " No."]
    assert [answer[-1] for _, answer in sft] == [2, 2]
    assert said[1] == "SFT texts: dropped 1 of 3 longer than 32 tokens"


def test_if_everything_is_too_long_the_flag_is_named():
    too_long = "all 2 are longer than --max-length 20"
    with pytest.raises(InputError, match=f"pairs: {too_long}"):
        encode_pairs(ByteTokenizer(), [PAIR, PAIR], 20, "pairs", quiet)
    with pytest.raises(InputError, match=f"SFT texts: {too_long}"):
        encode_sft(ByteTokenizer(), [PAIR, PAIR], 20, quiet)


# Token ids to batches.


def random_pairs(n, seed=0, most=12):
    """n encoded pairs of random ids of the tiny vocabulary and random lengths; EOS is 2."""
    rng = random.Random(seed)

    def ids(least):
        return [rng.randrange(3, SHAPE["vocab_size"]) for _ in range(rng.randint(least, most))]

    return [EncodedPair([1, *ids(1)], [*ids(1), 2], [*ids(1), 2]) for _ in range(n)]


def test_a_pair_is_one_row_scored_from_its_answers_to_their_eos():
    pairs = [EncodedPair([1, 5], [6, 2], [7, 8, 2]), EncodedPair([1, 9, 9], [4, 2], [2])]
    batch = pair_batch(pairs, [1, 0], "cpu")
    assert batch.tokens.tolist() == [[1, 9, 9, 4, 2, 2, 0], [1, 5, 6, 2, 7, 8, 2]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert batch.rejected.int().tolist() == [[0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1, 1]]
    assert (batch.count, batch.num_tokens, batch.indices) == (2, 5 + 4 + 4 + 5, [1, 0])


def test_both_answers_go_on_from_the_prompt_and_do_not_see_each_other():
    batch = pair_batch([EncodedPair([1, 5], [6, 2], [7, 8, 2])], [0], "cpu")
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    # What predicts 6, 2; 7, 8, 2: the prompt's last token twice.
    assert batch.sources[batch.loss_mask].tolist() == [1, 2, 1, 4, 5]
    assert batch.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 1, 1, 1],
    ]


def test_a_shared_prompt_gives_each_answers_own_log_probs_and_gradients():
    # The oracle is the plain layout: one row per answer, with a prompt of its own.
    pairs, model, other = random_pairs(7), tiny_llama(), tiny_llama()
    chosen, rejected = preference_logps(model, pair_batch(pairs, list(range(7)), "cpu"))
    for answers, logps in (("chosen", chosen), ("rejected", rejected)):
        rows = answer_rows([(pair.prompt, getattr(pair, answers)) for pair in pairs], "cpu")
        expected = sequence_logps(other, *rows)
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-10)
        expected.square().sum().backward()
    (chosen.square() + rejected.square()).sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fill", [0, 1, 2, 31])
def test_uneven_rows_keep_the_label_of_their_eos_whatever_the_pads_are(fill, monkeypatch):
    pairs = random_pairs(6)
    plain = pair_batch(pairs, list(range(6)), "cpu")
    pad = batches.pad

    def pad_with_fill(rows, old, *rest):
        return pad(rows, old if old is False else fill, *rest)  # tokens, not masks

    monkeypatch.setattr(batches, "pad", pad_with_fill)
    batch = pair_batch(pairs, list(range(6)), "cpu")
    assert (batch.tokens[:, -1] == fill).any()  # there are pads of this kind
    for i, (row, mask) in enumerate(zip(batch.tokens, batch.loss_mask, strict=True)):
        assert row[mask].tolist() == pairs[i].chosen + pairs[i].rejected
    model = tiny_llama()
    for ours, expected in zip(
        preference_logps(model, batch), preference_logps(model, plain), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_padding_is_on_the_right_and_only_as_long_as_the_longest_row():
    pairs = random_pairs(5)
    batch = pair_batch(pairs, [0, 1, 2, 3, 4], "cpu")
    lengths = [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs]
    assert batch.tokens.shape == batch.loss_mask.shape == (5, max(lengths))
    assert batch.num_tokens == sum(lengths) + sum(len(p.prompt) for p in pairs)
    for row, mask, n in zip(batch.tokens, batch.loss_mask, lengths, strict=True):
        assert row[0] == 1 and mask[n - 1 :].tolist() == [True] + [False] * (len(mask) - n)


# The order.


def test_the_rows_of_a_window_are_sorted_by_length_without_the_pairs_that_do_not_fit():
    pairs = random_pairs(40)
    pairs[3] = pairs[17] = None  # too long
    window = random.Random(0).sample(range(40), 30)
    rows = pair_rows(pairs, window)
    assert sorted(rows) == sorted(set(window) - {3, 17})
    lengths = [len(p) + len(c) + len(r) for p, c, r in (pairs[i] for i in rows)]
    assert lengths == sorted(lengths)


def take(order, n):
    """The next n batches."""
    return [next(order) for _ in range(n)]


@pytest.mark.parametrize(("n", "size"), [(40, 8), (37, 8), (1, 4), (700, 3)])
def test_every_index_comes_once_an_epoch(n, size):
    lengths = [random.Random(i).randrange(5, 50) for i in range(n)]
    order, per_epoch = batch_order(lengths, size, 0), -(-n // size)
    epochs = [take(order, per_epoch) for _ in range(3)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(n))
        assert max(map(len, epoch)) <= size
    if n > 1:
        assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_and_not_on_the_random_state_or_on_reading():
    lengths = [i % 17 for i in range(200)]
    torch.manual_seed(1)
    random.seed(1)
    first = take(batch_order(lengths, 4, 7), 120)
    torch.manual_seed(2)
    random.seed(2)
    state = torch.get_rng_state()
    order, batches = batch_order(lengths, 4, 7), []
    for _ in range(120):
        batches += take(order, 1)
        torch.rand(3)  # what a dropout layer, or a reference pass, would do between two batches
        random.random()
    assert batches == first
    torch.set_rng_state(state)
    take(batch_order(lengths, 4, 7), 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert take(batch_order(lengths, 4, 8), 120) != first


def test_the_seed_decides_which_pairs_share_a_window_and_in_which_order_its_batches_come():
    # Two windows of 64 batches each, all lengths different.
    lengths = list(range(5, 5 + 2 * 64 * 3))
    one, other = (take(batch_order(lengths, 3, seed), 64) for seed in (1, 2))
    windows = [{i for batch in batches for i in batch} for batches in (one, other)]
    assert len(windows[0]) == len(windows[1]) == 64 * 3 and windows[0] != windows[1]
    # A single window: whatever the seed, sorted by length and cut, so only the order differs.
    one, other = (take(batch_order(lengths[:60], 3, seed), 20) for seed in (1, 2))
    assert sorted(one) == sorted(other) == [[i, i + 1, i + 2] for i in range(0, 60, 3)]
    assert one != other and sorted(one) != one


def orders(seed=0):
    """{name: (an order that has several windows per epoch, batch size)}."""
    pairs = random_pairs(300, most=9)
    pairs[::7] = [None] * len(pairs[::7])  # too long: windows differ in how many rows they have
    examples = [(pair.prompt, pair.chosen) if pair else None for pair in pairs]
    packed = packed_order(examples, max_length=24, window=50, seed=seed)
    return {"pairs": (pair_order(pairs, 2, seed), 2), "packed": (packed, 3)}


@pytest.mark.parametrize("name", ["pairs", "packed"])
def test_an_order_goes_on_behind_any_place_exactly(name):
    order, size = orders()[name]
    drawn = list(itertools.islice(order.batches(size), 400))  # into the third epoch
    assert drawn[-1][1][0] > 2 * -(-order.n // order.window)
    places = [place for _, place in drawn]
    assert places == sorted(set(places))
    for done in (1, 2, 7, 63, 64, 65, 150, 151, 380):
        rest = order.batches(size, places[done - 1])
        assert list(itertools.islice(rest, 20)) == drawn[done : done + 20], done
    again = orders()[name][0].batches(size, (0, 0))  # another object, from the beginning
    assert list(itertools.islice(again, 30)) == drawn[:30]


def test_the_rows_and_batches_of_an_epoch_are_counted():
    pairs = random_pairs(130)
    order = pair_order(pairs, 4, 0)  # one window of 130 pairs
    assert (order.num_rows(), order.num_batches(4)) == (130, 33)
    epoch = list(itertools.islice(order.batches(4), 34))
    assert [place for _, place in epoch[-2:]] == [(0, 33), (1, 1)]
    examples = [(pair.prompt, pair.chosen) for pair in pairs]
    packed = packed_order(examples, 40, len(examples), 0)
    rows = pack([len(p) + len(a) for p, a in examples], 40)
    assert packed.num_rows() == len(rows) and packed.num_batches(4) == -(-len(rows) // 4)


def test_batches_are_of_similar_lengths_and_not_sorted_over_the_epoch():
    rng = random.Random(0)
    lengths = [rng.randrange(10, 500) for _ in range(512)]

    def padding(batches):
        padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
        return 1 - sum(lengths) / padded

    batches = take(batch_order(lengths, 8, 0), 64)
    shuffled = rng.sample(range(512), 512)
    # Eight uniform lengths have their maximum at 8/9 of the range: 42% padding; neighbours: 1.5%.
    assert padding([shuffled[i : i + 8] for i in range(0, 512, 8)]) > 0.3
    assert padding(batches) < 0.03
    longest = [max(lengths[i] for i in batch) for batch in batches]
    rising = sum(a < b for a, b in zip(longest, longest[1:], strict=False))
    assert 16 < rising < 48  # of 63 neighbours; sorted batches would have them all


# Packing.


def test_packing_places_every_example_once_and_fills_the_rows():
    rng = random.Random(0)
    lengths = [rng.randrange(5, 90) for _ in range(600)]
    rows = pack(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(600))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 128
    assert len(rows) <= 1.05 * sum(lengths) / 128  # at most 5% of the room is left empty


def test_packing_by_hand():
    rows = pack([3, 8, 5, 2, 4], 8)
    # 8 | 5, 3 | 4, 2: best fit decreasing puts 3 beside 5, where it fits exactly
    assert sorted(map(sorted, rows)) == [[0, 2], [1], [3, 4]]
    assert pack([4], 4) == [[0]]


def test_packed_rows_hold_the_examples_that_fit_in_an_order_as_random_as_that_of_their_indices():
    examples = [(pair.prompt, pair.chosen) for pair in random_pairs(200)]
    examples[5] = examples[50] = None  # too long
    window = random.Random(0).sample(range(200), 150)
    rows = packed_rows(examples, 30, window)
    assert sorted(i for row in rows for i in row) == sorted(set(window) - {5, 50})
    assert max(sum(len(p) + len(a) for p, a in (examples[i] for i in row)) for row in rows) <= 30
    # Each row comes where its first and longest text lay among the indices.
    places = [window.index(row[0]) for row in rows]
    assert places == sorted(places)
    lengths = [len(prompt) + len(answer) for prompt, answer in (examples[row[0]] for row in rows)]
    falling = sum(a > b for a, b in zip(lengths, lengths[1:], strict=False))
    assert len(rows) / 4 < falling < len(rows) * 3 / 4  # packing itself leaves them sorted


def packed_examples():
    """Seven examples of (prompt, answer) ids, and their rows when packed to 24 tokens."""
    examples = [(pair.prompt, pair.chosen) for pair in random_pairs(7, seed=3, most=6)]
    rows = pack([len(p) + len(a) for p, a in examples], 24)
    assert max(map(len, rows)) > 1 and len({sum(len(examples[i][0]) for i in r) for r in rows}) > 1
    return examples, rows


def packed_logps(model, examples, rows):
    """{example: its scored tokens' log-probabilities} of a packed batch."""
    batch = packed_batch(examples, rows, "cpu")
    logps = token_logps(model, batch.tokens, batch.loss_mask, batch.positions, batch.mask)
    assert batch.count == len(logps)
    numbers = [i for row in rows for i in row]
    parts = logps.split([len(examples[i][1]) for i in numbers])
    return dict(zip(numbers, parts, strict=True))


def test_packed_rows_equal_separate_rows():
    examples, rows = packed_examples()
    model = tiny_llama(torch.float32)
    for i, logps in packed_logps(model, examples, rows).items():
        alone = token_logps(model, *answer_rows([examples[i]], "cpu"))
        torch.testing.assert_close(logps, alone, rtol=0, atol=1e-5)


def test_packed_examples_never_see_each_other():
    examples, rows = packed_examples()
    model = tiny_llama(torch.float64)
    before = packed_logps(model, examples, rows)
    for changed in range(len(examples)):
        prompt, answer = examples[changed]
        others = [(t + 1) % SHAPE["vocab_size"] for t in prompt]
        varied = [*examples[:changed], (others, answer), *examples[changed + 1 :]]
        after = packed_logps(model, varied, rows)
        for i in before:
            same = torch.allclose(after[i], before[i], rtol=0, atol=1e-12)
            assert same == (i != changed), (i, changed, after[i], before[i])


def test_packed_rows_score_answers_only_and_count_what_they_hold():
    batch = packed_batch([([1, 5], [6, 2]), ([1, 7, 8], [2])], [[1, 0]], "cpu")
    assert batch.tokens.tolist() == [[1, 7, 8, 2, 1, 5, 6, 2]]
    assert batch.loss_mask[0].tolist() == [False] * 3 + [True] + [False] * 2 + [True] * 2
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert (batch.count, batch.num_tokens) == (3, 8)


def test_the_beginning_of_a_packed_example_is_never_scored():
    # Its first token would be predicted from the last one of its neighbour.
    examples, rows = packed_examples()
    batch = packed_batch(examples, rows, "cpu")
    assert batch.loss_mask[batch.positions == 0].nonzero().tolist() == []


def test_packed_batches_train_all_positions_of_a_model_alike():
    # One row of one full example equals the plain causal model: the mask adds nothing of its own.
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SHAPE)).double()
    tokens = torch.randint(SHAPE["vocab_size"], (1, 9)).tolist()[0]
    batch = packed_batch([(tokens[:1], tokens[1:])], [[0]], "cpu")
    packed = model(batch.tokens, batch.positions, batch.mask)
    torch.testing.assert_close(packed, model(torch.tensor([tokens])), rtol=0, atol=1e-10)
