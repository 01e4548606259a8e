"""Preference files to pairs, pairs to token rows with a loss mask, rows to batches.

The text is the blog's: `Question: {question}\\n\\nAnswer: {answer}`, one BOS in front and one EOS
behind each answer. The answer and its EOS are scored, the question is not. Nothing is ever cut: a
text longer than `max_length` tokens is dropped and counted, since a cut answer teaches no ending.
Texts stay on disk (`store.py`); of a large file only those are in tokens that come next.
"""

import gzip
import itertools
import json
import os
import random
import zlib
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_minimal import InputError
from dpo_minimal.extras.parquet import read_parquet
from dpo_minimal.store import Pairs, PairStore, PreferencePair

# Bytes of text that are tokenized at the start, all at once: 3 seconds, and 300 MB, since a token
# is a Python number of 36 bytes. Of more, tokens are made as batches need them, and forgotten.
SMALL = 16_000_000
MAX_HELD_OUT = 1000  # pairs: they tell an accuracy to 1.5 points


class EncodedPair(NamedTuple):
    """A pair in token ids: the prompt with its BOS, the answers with their EOS."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


# --- files to pairs ---------------------------------------------------------------------------


def read_rows(path: Path):
    """Yield (place, row dict) of a JSON Lines file or a JSON array, either one gzipped or not.

    `place` reads "file, line 7". InputError for a missing, empty or damaged file, with the place.
    """
    if path.name.endswith(".parquet"):
        yield from read_parquet(path)
        return
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8") as file:
            first = next((line for line in file if line.strip()), None)
            if first is None:
                raise InputError(f"{path} is empty: it should hold preference pairs as JSON")
            file.seek(0)
            yield from (
                read_array(path, file) if first.lstrip()[0] == "[" else read_lines(path, file)
            )
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path}: not a whole UTF-8 text file ({error})") from None


def read_lines(path, file):
    """Yield (place, row) of each non-blank line of JSON Lines."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"{path}, line {number}", parse_json(path, line, number)


def read_array(path, file):
    """Yield (place, row) of each entry of one JSON array.

    The whole array is in memory: what is larger than memory should come as JSON Lines.
    """
    for number, row in enumerate(parse_json(path, file.read(), 1), start=1):
        yield f"{path}, entry {number}", row


def parse_json(path, text: str, first_line: int):
    """The value of a JSON text that starts at `first_line`; InputError names the broken line."""
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        place = f"{path}, line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{place}: broken JSON ({error.msg})") from None


def to_pair(place: str, row: dict) -> PreferencePair:
    """A row in one of the four usual forms as a pair; InputError if it has none of them."""
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected an object with a prompt and two answers")
    if "response_j" in row:  # stack-exchange-paired
        names = ("question", "response_j", "response_k")
    else:
        names = ("instruction" if "instruction" in row else "prompt", "chosen", "rejected")
    if names[0] not in row and "chosen" in row and "rejected" in row:  # HH-RLHF
        return split_dialogue(place, row["chosen"], row["rejected"])
    for name in names:
        if not isinstance(row.get(name), str):
            found = f"is {type(row[name]).__name__}, not text" if name in row else "is missing"
            raise InputError(f"{place}: the field {name!r} {found}; fields are {', '.join(row)}")
    prompt, chosen, rejected = (row[name] for name in names)
    if row.get("input"):  # an instruction's material
        prompt = f"{prompt}\n{row['input']}"
    return PreferencePair(question_of(prompt), chosen, rejected)


def split_dialogue(place: str, chosen: str, rejected: str) -> PreferencePair:
    """Split two dialogues after the last "Assistant:" of the beginning that they share."""
    shared = os.path.commonprefix([chosen, rejected])
    turn = "\n\nAssistant:"
    cut = shared.rfind(turn)
    if cut < 0:
        raise InputError(f"{place}: no prompt, and no beginning with 'Assistant:' that both share")
    prompt = shared[:cut].removeprefix("\n\nHuman:").strip()
    answers = [text[cut + len(turn) :].strip() for text in (chosen, rejected)]
    return PreferencePair(prompt, *answers)


def question_of(prompt: str) -> str:
    """The bare question, if a data set brings its prompts in the blog's template already."""
    stripped = prompt.rstrip(" ")
    if stripped.startswith("Question: ") and stripped.endswith("\n\nAnswer:"):
        return stripped[len("Question: ") : -len("\n\nAnswer:")]
    return prompt


def load_pairs(path, log=print, folder=None) -> Pairs:
    """The pairs of a file, or of all files of a folder in the order of their names.

    A pair without a preference (chosen = rejected) or with an empty answer is dropped, and `log`
    is told how many and where the first one was. InputError if no pair is left. The texts are
    copied to a temporary file, on the disk of `folder`: the result is a sequence that reads them.
    """
    path = Path(path)
    suffixes = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(suffixes))
        if not files:
            raise InputError(f"{path}: no {', '.join(suffixes)} file in this folder")
    store, dropped = PairStore(folder), {}  # reason: [how many, the first one's place]
    for place, row in itertools.chain.from_iterable(map(read_rows, files)):
        pair = to_pair(place, row)
        if reason := why_useless(pair):
            dropped.setdefault(reason, [0, place])[0] += 1
            continue
        try:
            store.append(pair)
        except UnicodeEncodeError as error:
            raise InputError(f"{place}: not valid Unicode ({error.reason})") from None
    if not len(store):
        why = "; ".join(f"{n} {reason}, the first at {at}" for reason, (n, at) in dropped.items())
        raise InputError(f"{path}: no usable preference pair ({why or 'no entries'})")
    for reason, (count, first) in dropped.items():
        log(f"{path}: dropped {count} {reason} (the first: {first})")
    return Pairs(store)


def why_useless(pair: PreferencePair) -> str | None:
    """Why nothing can be learned from a pair, if so."""
    if not pair.chosen.strip() or not pair.rejected.strip():
        return "with an empty answer"
    return "with chosen = rejected" if pair.chosen == pair.rejected else None


class Splits(NamedTuple):
    """What the stages learn from. Of the pairs in `sft`, SFT learns prompt and chosen answer."""

    sft: Pairs
    train: Pairs
    evaluation: Pairs


def load_splits(data, eval_data=None, seed: int = 0, log=print, folder=None) -> Splits:
    """Read a preference file, or a folder with `finetune/`, `rl/` and `evaluation/` parts.

    Without a part for SFT, SFT learns prompt + chosen of the training pairs. Without one for
    evaluation, some pairs are held out. folder: as for `load_pairs`.
    """
    data, load = Path(data), partial(load_pairs, log=log, folder=folder)
    if data.is_dir() and (data / "data").is_dir():
        data = data / "data"  # the hub's layout
    has_parts = (data / "rl").is_dir()
    train = load(data / "rl" if has_parts else data)
    if eval_data or (data / "evaluation").is_dir():
        evaluation = load(eval_data or data / "evaluation")
        if evaluation.num_bytes() > SMALL and len(evaluation) > MAX_HELD_OUT:
            chosen = sorted(random.Random(seed).sample(range(len(evaluation)), MAX_HELD_OUT))
            log(f"evaluation on {MAX_HELD_OUT} of {len(evaluation)} held-out pairs")
            evaluation = evaluation[np.array(chosen)]
    else:
        train, evaluation = hold_out(train, seed, data)
    sft = load(data / "finetune") if (data / "finetune").is_dir() else train
    return Splits(sft.each_text_once(), train, evaluation)


def hold_out(pairs: Pairs, seed: int, path) -> tuple[Pairs, Pairs]:
    """(training pairs, held-out pairs) without a question in common.

    Held out are 5% of the pairs, at least 16 and at most 1,000, whole questions at a time, by seed.
    """
    _, first, question, counts = np.unique(
        pairs.questions(), return_index=True, return_inverse=True, return_counts=True
    )
    questions = array("q", np.argsort(first).astype(np.int64).tobytes())  # as they first appear
    random.Random(seed).shuffle(questions)
    wanted, held = min(max(16, len(pairs) // 20), MAX_HELD_OUT), []
    while questions and wanted > 0:
        held.append(questions.pop())
        wanted -= int(counts[held[-1]])
    is_held = np.isin(question, held)  # bool [n]
    if is_held.all():
        raise InputError(f"{path}: {len(pairs)} pairs are too few to hold out 16: give --eval-data")
    return pairs[~is_held], pairs[is_held]


# --- pairs to token rows ----------------------------------------------------------------------


def format_prompt(question: str) -> str:
    """The prompt as it is tokenized everywhere. It ends in "Answer:", without a space.

    SentencePiece glues a space to the word behind it, so the space belongs to the answer: only so
    does the tokenized prompt + answer begin with the tokenized prompt.
    """
    return f"Question: {question}\n\nAnswer:"


def encode_example(tokenizer, question: str, *answers: str) -> tuple[list[int], ...]:
    """(prompt ids with BOS, each answer's ids with EOS), prompt and answer tokenized jointly."""
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
    encoded = EncodedPair(*encode_example(tokenizer, *pair))
    longer = max(len(encoded.chosen), len(encoded.rejected))
    return encoded if len(encoded.prompt) + longer <= max_length else None


def encode_text(tokenizer, text, max_length: int) -> tuple[list[int], list[int]] | None:
    """(prompt ids, answer ids) of a (question, answer, ...) text, or None if it is too long."""
    prompt, answer = encode_example(tokenizer, *text[:2])
    return (prompt, answer) if len(prompt) + len(answer) <= max_length else None


def keep_fitting(encoded: list, max_length: int, what: str, log=print) -> list:
    """Drop the Nones, tell `log` how many there were; InputError if nothing else is there."""
    kept = [item for item in encoded if item is not None]
    if not kept:
        raise InputError(
            f"{what}: all {len(encoded)} are longer than --max-length {max_length} tokens"
        )
    if len(kept) < len(encoded):
        dropped = len(encoded) - len(kept)
        log(f"{what}: dropped {dropped} of {len(encoded)} longer than {max_length} tokens")
    return kept


class TokensOnDemand(Sequence):
    """Texts that are tokenized when asked for: tokens[3] encodes the fourth; None is too long.

    `log` is told when 1, 10, 100, ... were too long: a log that shows their share and stays short.
    """

    def __init__(self, texts, encode, max_length: int, what: str, log=print):
        self.texts, self.encode, self.max_length = texts, encode, max_length
        self.what, self.log, self.asked, self.dropped = what, log, 0, 0
        log(f"{what}: {len(texts)}, tokenized as they are needed")

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i: int):
        tokens = self.encode(self.texts[i])
        self.asked += 1
        self.dropped += tokens is None
        if tokens is None and str(self.dropped).strip("0") == "1":
            so_far = f"dropped {self.dropped} of {self.asked} so far"
            self.log(f"{self.what}: {so_far}, longer than {self.max_length} tokens")
        return tokens


def encode_all(texts, encode, max_length: int, what: str, log=print) -> Sequence:
    """Texts in tokens: of few, those that fit, in a list; of many, `TokensOnDemand`."""
    encode = partial(encode, max_length=max_length)
    if isinstance(texts, Pairs) and texts.num_bytes() > SMALL:
        return TokensOnDemand(texts, encode, max_length, what, log)
    return keep_fitting([encode(text) for text in texts], max_length, what, log)


def encode_pairs(tokenizer, pairs, max_length: int, what: str, log=print) -> Sequence[EncodedPair]:
    """All pairs that fit, in order."""
    return encode_all(pairs, partial(encode_pair, tokenizer), max_length, what, log)


def encode_sft(tokenizer, texts, max_length: int, log=print) -> Sequence:
    """(prompt ids, answer ids) of the (question, answer, ...) texts that fit, in order."""
    return encode_all(texts, partial(encode_text, tokenizer), max_length, "SFT texts", log)
