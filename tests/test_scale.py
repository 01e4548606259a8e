"""Data larger than memory: texts on disk, tokens when needed, exact orders, a lazy reference."""

import itertools
import random
import tracemalloc

import pytest
import torch
from helpers import tiny_llama
from test_train import LN2, command, metrics, preference_rows, write_rows

from dpo_minimal import InputError, data, reference, run
from dpo_minimal.batches import packed_order, pair_batch, pair_order, windows
from dpo_minimal.data import PreferencePair, Subset, hold_out, load_pairs, without_repeats
from dpo_minimal.extras import large
from dpo_minimal.extras.large import PairsOnDisk, TokensOnDemand
from dpo_minimal.loop import load_state, save_state
from dpo_minimal.lora import add_adapter
from dpo_minimal.reference import known_reference_logps, new_table

NASTY = ["", " ", "\n\n", "a\r\nb\rc", "\0", "Ünïcode 😀 你好", "e\u0301", "\u2028", "x" * 70_000]


class WordTokenizer:
    """One token per word; `calls` are the texts that it has encoded."""

    bos_id, eos_id, vocab_size = 1, 2, 50

    def __init__(self):
        self.calls = []

    def encode(self, text, bos=False, eos=False):
        self.calls.append(text)
        return [1] * bos + [3 + len(word) for word in text.split()] + [2] * eos


def quiet(text):
    """A log that nobody reads."""


def stored(pairs) -> PairsOnDisk:
    """Pairs in a file."""
    on_disk = PairsOnDisk()
    for pair in pairs:
        on_disk.append(PreferencePair(*pair))
    return on_disk


def some_pairs(n, words=8, seed=0):
    """n pairs with different questions; answers have 1 to `words` words."""
    rng = random.Random(seed)

    def answer():
        return " ".join("w" * rng.randint(1, 9) for _ in range(rng.randint(1, words)))

    return [PreferencePair(f"q{i}", f"{i} {answer()}", answer()) for i in range(n)]


def on_demand(monkeypatch, pairs, max_length=99, log=quiet):
    """(counting tokenizer, tokens of stored pairs on demand)."""
    monkeypatch.setattr(large, "SMALL", 0)
    tokenizer = WordTokenizer()
    return tokenizer, large.encode_pairs(tokenizer, stored(pairs), max_length, "pairs", log)


def draw(batches, n):
    """The next n of an order's (rows, place)."""
    return list(itertools.islice(batches, n))


def indices(drawn):
    """The indices of pairs in drawn batches, one after the other."""
    return [i for rows, _ in drawn for i in rows]


# Texts on disk.


def test_every_text_is_read_back_bit_for_bit_in_any_order():
    rng = random.Random(0)
    pairs = [tuple(rng.choices(NASTY, k=3)) for _ in range(300)]
    read = stored(pairs)
    for i in rng.sample(range(300), 300):
        assert read[i] == PreferencePair(*pairs[i])
    assert list(read) == pairs and len(read) == 300
    assert read[-1] == pairs[-1] and read[-300] == pairs[0]
    assert list(Subset(read, range(10, 12))) == pairs[10:12]
    for beyond in (300, -301):
        with pytest.raises(IndexError):
            read[beyond]


def test_pairs_are_a_list_until_they_turn_out_to_be_large(monkeypatch):
    pairs = some_pairs(50)
    size = sum(len(text) for pair in pairs for text in pair)
    assert sum(map(large.num_bytes, pairs)) == size
    assert large.num_bytes(PreferencePair("é", "你", "😀")) == 2 + 3 + 4
    for most, kind in ((size, list), (size - 1, PairsOnDisk), (0, PairsOnDisk)):
        monkeypatch.setattr(large, "SMALL", most)
        kept = large.keep(iter(pairs))
        assert type(kept) is kind and list(kept) == pairs
        assert large.is_large(pairs) == (kind is PairsOnDisk)


def test_reading_a_file_takes_bytes_of_memory_per_pair_and_not_its_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "SMALL", 500_000)  # so much is in memory until it is known as large
    row = {"chosen": "good " * 1000, "rejected": "bad " * 1000}
    path = write_rows(tmp_path / "rows.jsonl", ({"prompt": f"q{i}", **row} for i in range(3000)))
    tracemalloc.start()
    pairs = load_pairs(path, quiet, large.keep)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == 3000 and sum(map(large.num_bytes, pairs)) > 9000 * 3000
    assert kept < 100 * 3000 + 200_000  # numbers, and the buffer of one file
    assert peak < 2_000_000  # one row at a time, of 27 MB


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
    assert {pair.prompt for pair in train} & {pair.prompt for pair in held} == set()
    again, other = (hold_out(pairs, seed, "path")[1] for seed in (0, 1))
    assert list(again) == list(held) != list(other)


def test_equal_texts_of_sft_are_told_by_prompt_and_answer_not_by_what_they_add_up_to():
    pairs = [("ab", "c", "x"), ("a", "bc", "x"), ("ab", "c", "y"), ("ab", "d", "x")]
    assert list(without_repeats(stored(pairs), ())) == [pairs[0], pairs[1], pairs[3]]


def test_the_splits_of_large_data_are_those_of_data_in_memory(tmp_path, monkeypatch):
    rows = [pair._asdict() for pair in some_pairs(200)]
    path, splits = write_rows(tmp_path / "rows.jsonl", rows), []
    for most in (large.SMALL, 0):
        monkeypatch.setattr(large, "SMALL", most)
        splits.append(large.load_splits(path, None, 3, quiet, tmp_path))
    assert type(splits[0].train.pairs) is list and type(splits[1].train.pairs) is PairsOnDisk
    assert list(map(list, splits[1])) == list(map(list, splits[0]))
    assert list(map(list, data.load_splits(path, None, 3, quiet))) == list(map(list, splits[0]))


def test_of_a_large_evaluation_file_a_thousand_pairs_are_used(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "train.jsonl", preference_rows(5))
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(1200)]
    held, said = write_rows(tmp_path / "held.jsonl", rows), []
    assert len(large.load_splits(path, held, 0, said.append, tmp_path).evaluation) == 1200
    assert said == []
    monkeypatch.setattr(large, "SMALL", 0)
    evaluation = large.load_splits(path, held, 0, said.append, tmp_path).evaluation
    assert said == ["evaluation on 1000 of 1200 held-out pairs"]
    chosen = [int(pair.prompt[1:]) for pair in evaluation]
    assert len(set(chosen)) == len(chosen) == 1000
    assert chosen == sorted(chosen) and chosen != list(range(1000))  # a random part, in order
    again, other = (
        large.load_splits(path, held, seed, quiet, tmp_path).evaluation for seed in (0, 1)
    )
    assert list(again) == list(evaluation) != list(other)
    few = write_rows(tmp_path / "few.jsonl", rows[:1000])
    assert len(large.load_splits(path, few, 0, quiet, tmp_path).evaluation) == 1000


# The order.


@pytest.mark.parametrize(("n", "size"), [(1000, 64), (64, 64), (1, 5)])
def test_an_epoch_is_an_exact_shuffle_by_seed(n, size):
    def epochs(seed):
        read = windows(n, size, seed)
        return [[i for _ in range(-(-n // size)) for i in next(read)] for _ in range(3)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert [sorted(epoch) for epoch in first] == [list(range(n))] * 3 and first == again
    if n > 1:
        assert first[0] != first[1] != first[2] and first[0] != other[0]
        assert first[0] != sorted(first[0])


def test_the_order_is_the_same_on_every_machine():
    assert next(windows(10, 10, 0)).tolist() == [5, 4, 8, 2, 1, 9, 7, 0, 3, 6]


@pytest.mark.parametrize("cached", [256, 300, 2048])
def test_an_epoch_of_pairs_on_demand_tokenizes_each_text_once(monkeypatch, cached):
    monkeypatch.setattr(large, "CACHED", cached)  # a window is 64 batches of 4
    tokenizer, pairs = on_demand(monkeypatch, some_pairs(600))
    assert tokenizer.calls == []
    order = pair_order(pairs, 4, 0)
    assert order.num_batches(4) == 150
    seen = []
    for rows, _ in itertools.islice(order.batches(4), 150):
        pair_batch(pairs, rows, "cpu")  # asks for the tokens again
        seen += rows
        assert len(pairs.cache) <= cached
    assert sorted(seen) == list(range(600))
    assert len(tokenizer.calls) == len(set(tokenizer.calls)) == 3 * 600  # prompt, both answers


def test_the_latest_tokens_are_remembered_and_the_oldest_forgotten(monkeypatch):
    monkeypatch.setattr(large, "CACHED", 3)
    made = []

    def encode(pair):
        made.append(pair)
        return None if pair == "too long" else [len(pair)]

    tokens = TokensOnDemand(encode, ["a", "bb", "too long", "dddd", "eeeee"], 9, "texts", quiet)
    assert len(tokens) == 5 and made == []
    assert [tokens[i] for i in (0, 1, 2, 2, 1, 0)] == [[1], [2], None, None, [2], [1]]
    assert made == ["a", "bb", "too long"]
    assert tokens[3] == [4] and tokens[1] == [2] and tokens[2] is None
    assert made == ["a", "bb", "too long", "dddd"]
    assert tokens[0] == [1] and made[4:] == ["a"]  # made again
    assert tokens[2] is None and tokens[3] == [4] and made[5:] == []
    assert len(tokens.cache) == 3


def test_pairs_on_demand_come_in_the_order_and_tokens_of_pairs_in_memory(monkeypatch):
    texts = some_pairs(600)
    eager = large.encode_pairs(WordTokenizer(), stored(texts), 99, "pairs", quiet)
    _, lazy = on_demand(monkeypatch, texts)
    assert type(eager) is list and type(lazy) is TokensOnDemand
    both = [pair_order(pairs, 4, 7).batches(4) for pairs in (eager, lazy)]
    for _ in range(320):  # into the third epoch
        (rows, place), other = map(next, both)
        assert (rows, place) == other
        assert [eager[i] for i in rows] == [lazy[i] for i in rows]


def test_pairs_on_demand_that_are_too_long_are_dropped_and_counted(monkeypatch):
    texts, said = some_pairs(500, words=20), []
    fitting = [i for i, p in enumerate(texts) if 5 + max(len(t.split()) for t in p[1:]) <= 20]
    assert 200 < len(fitting) < 400
    _, pairs = on_demand(monkeypatch, texts, 20, said.append)
    drawn = draw(pair_order(pairs, 4, 0).batches(4), 2 * -(-len(fitting) // 4))
    assert sorted(indices(drawn)[: len(fitting)]) == fitting
    assert said[0] == "pairs: 500, tokenized as they are needed"
    assert [line.split()[2] for line in said[1:]] == ["1", "10", "100"]
    assert "longer than 20 tokens" in said[1]
    with pytest.raises(InputError, match="--max-length"):
        pair_order(on_demand(monkeypatch, texts, 5)[1], 4, 0)


@pytest.mark.parametrize("read", [0, 1, 63, 64, 65, 200])
def test_an_order_goes_on_from_its_place_without_tokenizing_what_came_before(monkeypatch, read):
    monkeypatch.setattr(large, "CACHED", 256)  # one window
    texts = some_pairs(1000, words=20)
    uninterrupted = pair_order(on_demand(monkeypatch, texts, 20)[1], 4, 0).batches(4)
    begun = draw(uninterrupted, read)
    place, expected = begun[-1][1] if begun else (0, 0), draw(uninterrupted, 70)
    tokenizer, pairs = on_demand(monkeypatch, texts, 20)
    assert draw(pair_order(pairs, 4, 0).batches(4, place), 70) == expected
    # The first window, for the number of steps, and at most three that 70 batches reach into.
    assert len(tokenizer.calls) <= 3 * 256 * 4


def test_texts_on_demand_are_packed_a_window_at_a_time(monkeypatch):
    monkeypatch.setattr(large, "SMALL", 0)
    tokenizer, texts = WordTokenizer(), some_pairs(3000, words=20)
    examples, window = large.encode_sft(tokenizer, stored(texts), 24, quiet)
    assert window == 1024
    order = packed_order(examples, 24, window, 0)
    assert len(tokenizer.calls) == 2 * 1024

    def size(row):
        return sum(len(prompt) + len(answer) for prompt, answer in (examples[i] for i in row))

    seen, rows = [], 0
    for batch, (number, _) in order.batches(8):
        if number == 3:  # 1,024 + 1,024 + 952 texts: the second epoch begins
            break
        rows += len(batch)
        for row in batch:
            assert size(row) <= 24
            seen += row
    fitting = [i for i, e in enumerate(texts) if 5 + len(e[1].split()) <= 24]
    assert sorted(seen) == fitting and 2000 < len(fitting) < 3000
    assert abs(order.num_rows() - rows) < 0.1 * rows
    filled = [size(row) for row in order.form(next(windows(3000, window, 0)))]
    falling = sum(a > b for a, b in zip(filled, filled[1:], strict=False))
    assert falling > 50  # as packing leaves them, the fullest rows come first: 20 times or so


# The reference.


def test_texts_in_memory_are_packed_all_together():
    texts = some_pairs(300)
    examples, window = large.encode_sft(WordTokenizer(), texts, 24, quiet)
    assert type(examples) is list and len(examples) == window == 300


def test_the_reference_is_computed_once_per_pair_and_read_in_later_epochs_and_runs(
    tmp_path, monkeypatch
):
    model = tiny_llama(torch.float32, vocab_size=50)
    add_adapter(model, "sft", r=2)
    add_adapter(model, "dpo", r=2)
    pairs = data.encode_pairs(WordTokenizer(), stored(some_pairs(10)), 99, "pairs", quiet)
    computed, right = [], reference.reference_logps

    def count(model, batch):
        computed.extend(batch.indices)
        return right(model, batch)

    monkeypatch.setattr(reference, "reference_logps", count)
    table, values = new_table(10), {}
    for rows, _ in draw(pair_order(pairs, 4, 0).batches(4), 9):  # three epochs
        batch = pair_batch(pairs, rows, "cpu")
        logps = known_reference_logps(model, batch, table)
        for i, value in zip(batch.indices, logps.tolist(), strict=True):
            assert values.setdefault(i, value) == value
    assert sorted(computed) == list(range(10))
    # It comes back with the state, as a run that goes on reads it.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    path, again = tmp_path / "dpo.pt", new_table(10)
    save_state(path, model, optimizer, {"training": table}, reached=(9, 0, (2, 3)))
    load_state(path, model, optimizer, {"training": again})
    assert torch.equal(known_reference_logps(model, batch, again), logps)
    assert again.tolist() == table.tolist() and len(computed) == 10


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
    monkeypatch.setattr(large, "SMALL", 0)
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
    monkeypatch.setattr(large, "SMALL", 0)
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
