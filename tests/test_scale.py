"""Data larger than memory: texts on disk, tokens when needed, exact orders, a lazy reference."""

import random
import tracemalloc

import pytest
import torch
from dpo_minimal.store import Pairs, PairStore, PreferencePair
from helpers import tiny_llama
from test_train import LN2, command, metrics, preference_rows, write_rows

from dpo_minimal import InputError, data, reference, run
from dpo_minimal.batches import joined, packed_batches, pair_batch, pair_batches, windows
from dpo_minimal.data import encode_pairs, encode_sft, hold_out, load_pairs, load_splits
from dpo_minimal.lora import add_adapter
from dpo_minimal.reference import Reference

NASTY = ["", " ", "\n\n", "a\r\nb\rc", "\0", "Ünïcode 😀 你好", "e\u0301", "\u2028", "x" * 70_000]


class WordTokenizer:
    """A token a word; it counts how often it encodes which text."""

    bos_id, eos_id, vocab_size = 1, 2, 50

    def __init__(self):
        self.calls = []

    def encode(self, text, bos=False, eos=False):
        self.calls.append(text)
        return [1] * bos + [3 + len(word) for word in text.split()] + [2] * eos


def quiet(text):
    """A log that nobody reads."""


def stored(pairs) -> Pairs:
    """Pairs in a store."""
    store = PairStore()
    for pair in pairs:
        store.append(PreferencePair(*pair))
    return Pairs(store)


def some_pairs(n, words=8, seed=0):
    """n pairs with different questions; answers have 1 to `words` words."""
    rng = random.Random(seed)

    def answer():
        return " ".join("w" * rng.randint(1, 9) for _ in range(rng.randint(1, words)))

    return [(f"q{i}", f"{i} {answer()}", answer()) for i in range(n)]


def on_demand(monkeypatch, pairs, max_length=99, log=quiet):
    """(counting tokenizer, tokens of stored pairs on demand)."""
    monkeypatch.setattr(data, "SMALL", 0)
    tokenizer = WordTokenizer()
    return tokenizer, encode_pairs(tokenizer, stored(pairs), max_length, "pairs", log)


def draw(order, n):
    """The indices in each of the next n batches."""
    return [list(joined(rows)) for _, rows in zip(range(n), order, strict=False)]


# Texts on disk.


def test_every_text_is_read_back_bit_for_bit_in_any_order():
    rng = random.Random(0)
    pairs = [tuple(rng.choices(NASTY, k=3)) for _ in range(300)]
    read = stored(pairs)
    for i in rng.sample(range(300), 300):
        assert read[i] == PreferencePair(*pairs[i])
    assert list(read) == pairs and read[-1] == pairs[-1] and list(read[10:12]) == pairs[10:12]
    with pytest.raises(IndexError):
        read[300]


def test_reading_a_file_takes_bytes_of_memory_a_pair_and_not_its_texts(tmp_path):
    row = {"chosen": "good " * 1000, "rejected": "bad " * 1000}
    path = write_rows(tmp_path / "rows.jsonl", ({"prompt": f"q{i}", **row} for i in range(3000)))
    tracemalloc.start()
    pairs = load_pairs(path, quiet)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == 3000 and pairs.num_bytes() > 9000 * 3000
    assert kept < 100 * 3000 + 200_000  # numbers, and the buffer of one file
    assert peak < 2_000_000  # a row at a time, of 27 MB


def test_a_text_that_is_not_valid_unicode_is_named(tmp_path):
    row = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "\ud800"}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match="rows.jsonl, line 1: not valid Unicode"):
        load_pairs(path, quiet)


def test_a_large_file_has_1000_pairs_held_out_and_no_question_in_common():
    rng = random.Random(0)
    questions = [f"q{rng.randrange(9000)}" for _ in range(30_000)]
    pairs = stored((q, f"yes {i}", "no") for i, q in enumerate(questions))
    train, held = hold_out(pairs, 0, "path")
    assert 1000 <= len(held) < 1020 and len(train) + len(held) == 30_000
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held}
    again, other = (hold_out(pairs, seed, "path")[1] for seed in (0, 1))
    assert list(again) == list(held) != list(other)


def test_equal_texts_of_sft_are_told_by_prompt_and_answer_not_by_what_they_add_up_to():
    pairs = [("ab", "c", "x"), ("a", "bc", "x"), ("ab", "c", "y"), ("ab", "d", "x")]
    assert list(stored(pairs).each_text_once()) == [pairs[0], pairs[1], pairs[3]]


def test_of_a_large_evaluation_file_a_thousand_pairs_are_used(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "train.jsonl", preference_rows(5))
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(1200)]
    held, said = write_rows(tmp_path / "held.jsonl", rows), []
    assert len(load_splits(path, held, log=said.append).evaluation) == 1200 and not said
    monkeypatch.setattr(data, "SMALL", 0)
    evaluation = load_splits(path, held, log=said.append).evaluation
    assert len({pair.prompt for pair in evaluation}) == 1000 and "1000 of 1200" in said[0]


# The order.


@pytest.mark.parametrize(("n", "size"), [(1000, 64), (64, 64), (1, 5)])
def test_an_epoch_is_an_exact_shuffle_by_seed(n, size):
    def epochs(seed):
        read = windows(n, size, seed)
        return [[i for _ in range(-(-n // size)) for i in next(read)] for _ in range(3)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert all(sorted(epoch) == list(range(n)) for epoch in first) and first == again
    if n > 1:
        assert first[0] != first[1] != first[2] and first[0] != other[0]
        assert first[0] != sorted(first[0])


def test_the_order_is_the_same_on_every_machine():
    assert next(windows(10, 10, 0)).tolist() == [5, 4, 8, 2, 1, 9, 7, 0, 3, 6]


def test_an_epoch_of_pairs_on_demand_tokenizes_each_text_once(monkeypatch):
    tokenizer, pairs = on_demand(monkeypatch, some_pairs(600))
    assert not tokenizer.calls
    order = pair_batches(pairs, 4, 0)
    assert order.num_batches() == 150
    seen = [i for batch in draw(order, 150) for i in batch]
    assert sorted(seen) == list(range(600))
    assert len(tokenizer.calls) == len(set(tokenizer.calls)) == 3 * 600  # prompt, both answers


def test_pairs_on_demand_come_in_the_order_and_tokens_of_pairs_in_memory(monkeypatch):
    texts = some_pairs(600)
    eager = encode_pairs(WordTokenizer(), stored(texts), 99, "pairs", quiet)
    _, lazy = on_demand(monkeypatch, texts)
    assert isinstance(eager, list) and not isinstance(lazy, list)
    both = [iter(pair_batches(pairs, 4, 7)) for pairs in (eager, lazy)]
    for _ in range(320):  # into the third epoch
        assert next(both[0]) == next(both[1])


def test_pairs_on_demand_that_are_too_long_are_dropped_and_counted(monkeypatch):
    texts, said = some_pairs(500, words=20), []
    fitting = {i for i, p in enumerate(texts) if 5 + max(len(t.split()) for t in p[1:]) <= 20}
    assert 200 < len(fitting) < 400
    _, pairs = on_demand(monkeypatch, texts, 20, said.append)
    batches = draw(pair_batches(pairs, 4, 0), 2 * -(-len(fitting) // 4))
    seen = [i for batch in batches for i in batch][: len(fitting)]
    assert sorted(seen) == sorted(fitting)
    assert said[0] == "pairs: 500, tokenized as they are needed"
    assert [line.split()[2] for line in said[1:]] == ["1", "10", "100"]
    assert "longer than 20 tokens" in said[1]
    with pytest.raises(InputError, match="--max-length"):
        pair_batches(on_demand(monkeypatch, texts, 5)[1], 4, 0)


@pytest.mark.parametrize("read", [0, 1, 63, 64, 65, 200])
def test_an_order_goes_on_from_its_place_without_tokenizing_what_came_before(monkeypatch, read):
    texts = some_pairs(1000, words=20)
    whole = pair_batches(on_demand(monkeypatch, texts, 20)[1], 4, 0)
    uninterrupted = iter(whole)
    draw(uninterrupted, read)
    place, expected = whole.place, draw(uninterrupted, 70)
    tokenizer, pairs = on_demand(monkeypatch, texts, 20)
    resumed = pair_batches(pairs, 4, 0)
    resumed.place = place
    assert draw(resumed, 70) == expected
    assert len(tokenizer.calls) <= 3 * 256 * 4  # windows: the first, for the number of steps


def test_texts_on_demand_are_packed_a_window_at_a_time(monkeypatch):
    monkeypatch.setattr(data, "SMALL", 0)
    tokenizer, texts = WordTokenizer(), some_pairs(3000, words=20)
    examples = encode_sft(tokenizer, stored(texts), 24, quiet)
    order = packed_batches(examples, 24, 0)
    order.batch_size = 8
    assert len(tokenizer.calls) == 2 * 1024
    seen, rows = [], 0
    for batch in order:
        if order.place[0] == 3:  # 1,024 + 1,024 + 952 texts: the second epoch begins
            break
        rows += len(batch)
        for row in batch:
            assert sum(len(prompt) + len(answer) for prompt, answer in row.values()) <= 24
            seen += row
    fitting = [i for i, e in enumerate(texts) if 5 + len(e[1].split()) <= 24]
    assert sorted(seen) == fitting and 2000 < len(fitting) < 3000
    assert abs(order.num_rows() - rows) < 0.1 * rows
    filled = [sum(len(p) + len(a) for p, a in row.values()) for row in order.first]
    falling = sum(a > b for a, b in zip(filled, filled[1:], strict=False))
    assert falling > 50  # as packing leaves them, the fullest rows come first: 20 times or so


# The reference.


def test_the_reference_is_computed_once_a_pair_and_read_in_later_epochs_and_runs(
    tmp_path, monkeypatch
):
    model = tiny_llama(torch.float32, vocab_size=50)
    add_adapter(model, "sft", r=2)
    add_adapter(model, "dpo", r=2)
    pairs = encode_pairs(WordTokenizer(), stored(some_pairs(10)), 99, "pairs", quiet)
    computed, right = [], reference.reference_logps

    def count(model, batch):
        computed.extend(batch.indices)
        return right(model, batch)

    monkeypatch.setattr(reference, "reference_logps", count)
    table, values = Reference(tmp_path / "reference.pt", 10), {}
    for _, rows in zip(range(9), pair_batches(pairs, 4, 0), strict=False):  # three epochs
        batch = pair_batch(pairs, list(joined(rows)), "cpu")
        for i, value in zip(batch.indices, table.logps(model, batch).tolist(), strict=True):
            assert values.setdefault(i, value) == value
    assert sorted(computed) == list(range(10))
    table.save()
    again = Reference(tmp_path / "reference.pt", 10)
    assert torch.equal(again.logps(model, batch), table.logps(model, batch))
    assert len(computed) == 10


# A run.


@pytest.fixture
def flags(tmp_path, model_folder):
    """A small run, with its data, and two stages in one."""
    path = write_rows(tmp_path / "pairs.jsonl", preference_rows())
    steps = ["--batch-size", 4, "--grad-accum", 1, "--max-steps", 9, "--max-length", 128]
    return ["--model", model_folder, "--data", path, *steps]


def train_both(flags, out, *more):
    """SFT, then DPO."""
    command(*flags, "--out", out, "--stage", "sft", *more)
    command(*flags, "--out", out, "--stage", "dpo", *more)


def test_a_run_on_demand_equals_a_run_in_memory(tmp_path, flags, monkeypatch, capsys):
    train_both(flags, tmp_path / "memory")
    monkeypatch.setattr(data, "SMALL", 0)
    train_both(flags, tmp_path / "demand")
    assert "tokenized as they are needed" in capsys.readouterr().out
    assert metrics(tmp_path / "demand") == metrics(tmp_path / "memory")
    for file in ("sft/adapter_model.safetensors", "dpo/adapter_model.safetensors"):
        one, other = (tmp_path / out / file for out in ("demand", "memory"))
        assert one.read_bytes() == other.read_bytes()
    dpo = [row for row in metrics(tmp_path / "demand") if row["stage"] == "dpo"]
    assert dpo[0]["eval_rewards/margins"] == dpo[1]["rewards/margins"] == 0
    assert abs(dpo[1]["loss"] - LN2) <= 2**-25


def test_a_run_on_demand_goes_on_after_a_kill_with_what_it_knows(tmp_path, flags, monkeypatch):
    monkeypatch.setattr(data, "SMALL", 0)
    train_both(flags, tmp_path / "whole")
    computed, right = [], reference.reference_logps

    def count_and_die(model, batch):
        computed.append(batch.indices)
        if len(computed) == 10:  # 4 held-out batches, then steps 0 to 5
            raise KeyboardInterrupt
        return right(model, batch)

    out = tmp_path / "killed"
    monkeypatch.setattr(reference, "reference_logps", count_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_both(flags, out, "--save-every", 2)
    command("--resume", "--out", out, "--stage", "dpo")
    assert metrics(out) == metrics(tmp_path / "whole")
    assert len(computed) == 10 + 3  # steps 4, 5 and 6 of the first epoch's 7; the others were kept


def test_many_pairs_begin_without_an_evaluation_of_what_is_known(tmp_path, flags, monkeypatch):
    monkeypatch.setattr(run, "MANY", 20)
    train_both(flags, tmp_path / "run", "--max-steps", 2)
    dpo = [row for row in metrics(tmp_path / "run") if row["stage"] == "dpo"]
    assert ["eval_loss" in row for row in dpo] == [False, False, True]
