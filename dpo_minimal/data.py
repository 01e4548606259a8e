"""Preference files to pairs, and pairs to token ids with a safe boundary before the answer.

The text is the blog's: `Question: {question}\\n\\nAnswer: {answer}`, with one BOS in front and one
EOS behind each answer. The answer and its EOS are scored; the question is not. Nothing is ever cut:
a text longer than `max_length` tokens is dropped and counted, because a model that learns from cut
answers learns not to end them.
"""

import random
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_minimal import InputError
from dpo_minimal.formats.conversations import HUMAN, only_question
from dpo_minimal.formats.layout import data_parts
from dpo_minimal.formats.rows import data_files, pair_of, read_rows

MAX_CHARACTERS = 2**20  # a longer text would take seconds and gigabytes to tokenize
MAX_HELD_OUT = 1000  # pairs: an accuracy then has a standard error of at most 1.6 points


class PreferencePair(NamedTuple):
    """A prompt and two answers to it; people preferred `chosen` to `rejected`."""

    prompt: str | tuple  # a question, or a conversation: see formats/conversations.py
    chosen: str
    rejected: str


class EncodedPair(NamedTuple):
    """A pair in token ids: the prompt with its BOS, both answers with their EOS."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def why_useless(pair: PreferencePair) -> str | None:
    """The reason if nothing can be learned from a pair, else None."""
    if not pair.chosen.strip() or not pair.rejected.strip():
        return "with an empty answer"
    if HUMAN in pair.chosen + pair.rejected:
        return "with a further turn inside an answer"
    if max(len(str(text)) for text in pair) > MAX_CHARACTERS:
        return f"with a text of more than {MAX_CHARACTERS:,} characters"
    return "with chosen = rejected" if pair.chosen == pair.rejected else None


def read_pairs(path, log=print):
    """Yield the pairs of a file, or of all files of a folder in the order of their names.

    A pair without a preference (chosen = rejected) or with an empty answer is dropped; at the end
    `log` is told how many were, and where the first one is. InputError if no pair is usable.
    """
    path, usable = Path(path), 0
    dropped, first_place = Counter(), {}  # both by reason
    for file in data_files(path):
        for place, row in read_rows(file):
            pair = PreferencePair(*pair_of(place, row))
            reason = why_useless(pair)
            if reason is None:
                usable += 1
                yield pair
            else:
                dropped[reason] += 1
                first_place.setdefault(reason, place)
    told = [f"{n} {reason}, the first at {first_place[reason]}" for reason, n in dropped.items()]
    if not usable:
        raise InputError(f"{path}: no usable preference pair ({'; '.join(told) or 'no entries'})")
    for line in told:
        log(f"{path}: dropped {line}")


class Splits(NamedTuple):
    """The pairs for SFT (which learns their chosen answers), for DPO, and for evaluation."""

    sft: Sequence[PreferencePair]
    train: Sequence[PreferencePair]
    evaluation: Sequence[PreferencePair]


def load_pairs(path, log=print, keep=list) -> Sequence[PreferencePair]:
    """`read_pairs` as a sequence. keep: turns the iterator into one, in memory or elsewhere."""
    return keep(read_pairs(path, log))


def load_splits(data, eval_data=None, seed: int = 0, log=print, keep=list) -> Splits:
    """Read a preference file, or a folder with parts: see `data_parts` for their names.

    Without a part for SFT, SFT learns prompt + chosen of the training pairs. Without one for
    evaluation, some questions are held out, from both. keep: as for `load_pairs`.
    """
    parts = data_parts(Path(data))
    train = load_pairs(parts["train"], log, keep)
    if eval_data or "evaluation" in parts:
        evaluation, held_out = load_pairs(eval_data or parts["evaluation"], log, keep), ()
    else:
        train, evaluation = hold_out(train, seed, data)
        held_out = evaluation
    sft = load_pairs(parts["sft"], log, keep) if "sft" in parts else train
    return Splits(without_repeats(sft, held_out), train, evaluation)


class Subset(Sequence):
    """Some pairs of a sequence, by their indices: the pairs themselves may be on disk."""

    def __init__(self, pairs, indices):
        self.pairs, self.indices = pairs, array("q", indices)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i: int):
        return self.pairs[self.indices[i]]


def without_repeats(pairs, held_out) -> Subset:
    """The first pair of each (prompt, chosen answer), without the questions that are held out."""
    held = {hash(pair.prompt) for pair in held_out}
    first = {}  # keyed by hash, because a million texts would not fit into memory
    for i, pair in enumerate(pairs):
        if hash(pair.prompt) not in held:
            first.setdefault(hash((pair.prompt, pair.chosen)), i)
    return Subset(pairs, first.values())


def hold_out(pairs, seed: int, path) -> tuple[Subset, Subset]:
    """(training pairs, held-out pairs) without a question in common.

    Whole questions are held out, chosen by the seed, until they have 5% of the pairs, at least 16
    and at most 1,000 (or so many more as the last one has). InputError if all would be held out.
    """
    hashes = array("q", (hash(pair.prompt) for pair in pairs))  # of each pair's question
    counts = Counter(hashes)
    questions = list(counts)  # in the order of the pairs, because Python's hashes differ by run
    random.Random(seed).shuffle(questions)
    wanted, held = min(max(16, len(pairs) // 20), MAX_HELD_OUT), set()
    while questions and wanted > 0:
        drawn = questions.pop()
        held.add(drawn)
        wanted -= counts[drawn]
    if len(held) == len(counts):
        found = f"{len(pairs)} pairs on {len(counts)} questions"
        raise InputError(f"{path}: {found} are too few to hold some out: give --eval-data")
    train = (i for i, question in enumerate(hashes) if question not in held)
    evaluation = (i for i, question in enumerate(hashes) if question in held)
    return Subset(pairs, train), Subset(pairs, evaluation)


# --- pairs to token ids -----------------------------------------------------------------------


def format_prompt(question) -> str:
    """The prompt as it is tokenized everywhere. It ends in "Answer:", without a space.

    SentencePiece glues a space to the word behind it, so the space belongs to the answer. Only then
    does the tokenized prompt + answer begin with the tokenized prompt.
    """
    return f"Question: {only_question(question)}\n\nAnswer:"


def encode_example(tokenizer, question, *answers: str) -> tuple[list[int], ...]:
    """(prompt ids with BOS, ids with EOS of each answer); each answer is tokenized with the prompt.

    InputError if the tokenizer merges the end of the prompt with the beginning of an answer.
    """
    if getattr(tokenizer, "template", None):  # an instruct model's own, in place of the blog's
        return tokenizer.template.encode_example(question, *answers)
    prompt = tokenizer.encode(format_prompt(question), bos=True)
    encoded = [prompt]
    for answer in answers:
        joint = tokenizer.encode(f"{format_prompt(question)} {answer}", bos=True, eos=True)
        if joint[: len(prompt)] != prompt:
            raise InputError(
                f"this tokenizer merges 'Answer:' with what follows, as in {answer[:40]!r}"
            )
        encoded.append(joint[len(prompt) :])
    return tuple(encoded)


def encode_pair(tokenizer, pair: PreferencePair, max_length: int) -> EncodedPair | None:
    """The pair in tokens, or None if prompt + an answer is longer than max_length tokens."""
    encoded = EncodedPair(*encode_example(tokenizer, pair.prompt, pair.chosen, pair.rejected))
    longer = max(len(encoded.chosen), len(encoded.rejected))
    return encoded if len(encoded.prompt) + longer <= max_length else None


def encode_text(tokenizer, pair: PreferencePair, max_length: int):
    """What SFT learns from a pair, (prompt ids, chosen ids), or None if that is too long."""
    prompt, chosen = encode_example(tokenizer, pair.prompt, pair.chosen)
    return (prompt, chosen) if len(prompt) + len(chosen) <= max_length else None


def encode_pairs(tokenizer, pairs, max_length: int, what: str, log=print) -> list[EncodedPair]:
    """All pairs that fit, in order. what: the name that `log` and errors give them."""
    encoded = [encode_pair(tokenizer, pair, max_length) for pair in pairs]
    return keep_fitting(encoded, max_length, what, log)


def encode_sft(tokenizer, pairs, max_length: int, log=print) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, chosen ids) of all pairs that fit, in order."""
    encoded = [encode_text(tokenizer, pair, max_length) for pair in pairs]
    return keep_fitting(encoded, max_length, "SFT texts", log)


def keep_fitting(encoded: list, max_length: int, what: str, log=print) -> list:
    """Drop the Nones and tell `log` how many there were; InputError if nothing is left."""
    kept = [tokens for tokens in encoded if tokens is not None]
    if not kept:
        raise InputError(f"{what}: all {len(encoded)} are longer than --max-length {max_length}")
    if len(kept) < len(encoded):
        dropped = len(encoded) - len(kept)
        log(f"{what}: dropped {dropped} of {len(encoded)} longer than {max_length} tokens")
    return kept
