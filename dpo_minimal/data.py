"""Preference files to pairs, pairs to token rows with a loss mask, rows to batches.

The text is the blog's: `Question: {question}\\n\\nAnswer: {answer}`, one BOS in front and one EOS
behind each answer. The answer and its EOS are scored, the question is not. Nothing is ever cut: a
text longer than `max_length` tokens is dropped and counted, since a cut answer teaches no ending.
"""

import gzip
import itertools
import json
import os
import random
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from dpo_minimal import InputError
from dpo_minimal.extras.parquet import read_parquet


class PreferencePair(NamedTuple):
    """A question and two answers to it, as text; people preferred `chosen` to `rejected`."""

    prompt: str
    chosen: str
    rejected: str


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
    """Yield (place, row) of each entry of one JSON array."""
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


def load_pairs(path, log=print) -> list[PreferencePair]:
    """The pairs of a file, or of all files of a folder in the order of their names.

    A pair without a preference (chosen = rejected) or with an empty answer is dropped, and `log`
    is told how many and where the first one was. InputError if no pair is left.
    """
    path = Path(path)
    suffixes = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(suffixes))
        if not files:
            raise InputError(f"{path}: no {', '.join(suffixes)} file in this folder")
    pairs, dropped = [], {}
    for place, row in itertools.chain.from_iterable(map(read_rows, files)):
        pair = to_pair(place, row)
        reason = None
        if not pair.chosen.strip() or not pair.rejected.strip():
            reason = "with an empty answer"
        elif pair.chosen == pair.rejected:
            reason = "with chosen = rejected"
        if reason:
            dropped.setdefault(reason, []).append(place)
        else:
            pairs.append(pair)
    if not pairs:
        why = "; ".join(f"{len(p)} {reason}, the first at {p[0]}" for reason, p in dropped.items())
        raise InputError(f"{path}: no usable preference pair ({why or 'no entries'})")
    for reason, places in dropped.items():
        log(f"{path}: dropped {len(places)} {reason} (the first: {places[0]})")
    return pairs


class Splits(NamedTuple):
    """What the stages learn from: (question, answer) texts for SFT, pairs for the others."""

    sft: list[tuple[str, str]]
    train: list[PreferencePair]
    evaluation: list[PreferencePair]


def load_splits(data, eval_data=None, seed: int = 0, log=print) -> Splits:
    """Read a preference file, or a folder with `finetune/`, `rl/` and `evaluation/` parts.

    Without a part for SFT, SFT learns prompt + chosen of the training pairs. Without one for
    evaluation, 5% of the pairs (at least 16) are held out by seed, whole questions at a time.
    """
    data = Path(data)
    if data.is_dir() and (data / "data").is_dir():
        data = data / "data"  # the hub's layout
    has_parts = (data / "rl").is_dir()
    pairs = load_pairs(data / "rl" if has_parts else data, log)
    if eval_data or (data / "evaluation").is_dir():
        train, evaluation = pairs, load_pairs(eval_data or data / "evaluation", log)
    else:
        train, evaluation = hold_out(pairs, seed, data)
    sft_pairs = load_pairs(data / "finetune", log) if (data / "finetune").is_dir() else train
    sft = list(dict.fromkeys((pair.prompt, pair.chosen) for pair in sft_pairs))  # each text once
    return Splits(sft, train, evaluation)


def hold_out(pairs: list[PreferencePair], seed: int, path):
    """Split off 5% of the pairs, at least 16, so that no held-out question is trained on."""
    questions = list(dict.fromkeys(pair.prompt for pair in pairs))
    random.Random(seed).shuffle(questions)
    counts = Counter(pair.prompt for pair in pairs)
    wanted, held = max(16, len(pairs) // 20), set()
    while questions and wanted > 0:
        question = questions.pop()
        held.add(question)
        wanted -= counts[question]
    train = [pair for pair in pairs if pair.prompt not in held]
    if not train:
        raise InputError(f"{path}: {len(pairs)} pairs are too few to hold out 16: give --eval-data")
    return train, [pair for pair in pairs if pair.prompt in held]


# --- pairs to token rows ----------------------------------------------------------------------


def format_prompt(question: str) -> str:
    """The prompt as it is tokenized everywhere. It ends in "Answer:", without a space.

    SentencePiece glues a space to the word behind it, so the space belongs to the answer: only so
    does the tokenized prompt + answer begin with the tokenized prompt.
    """
    return f"Question: {question}\n\nAnswer:"


def encode_example(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """(prompt ids with BOS, answer ids with EOS) of the jointly tokenized text."""
    prompt = tokenizer.encode(format_prompt(question), bos=True)
    joint = tokenizer.encode(f"{format_prompt(question)} {answer}", bos=True, eos=True)
    if joint[: len(prompt)] != prompt:
        raise InputError(
            f"this tokenizer merges 'Answer:' with what follows, as in {answer[:40]!r}"
        )
    return prompt, joint[len(prompt) :]


def encode_pair(tokenizer, pair: PreferencePair, max_length: int) -> EncodedPair | None:
    """The pair in tokens, or None if prompt + an answer is longer than max_length tokens."""
    prompt, chosen = encode_example(tokenizer, pair.prompt, pair.chosen)
    _, rejected = encode_example(tokenizer, pair.prompt, pair.rejected)
    fits = len(prompt) + max(len(chosen), len(rejected)) <= max_length
    return EncodedPair(prompt, chosen, rejected) if fits else None


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


def encode_pairs(tokenizer, pairs, max_length: int, what: str, log=print) -> list[EncodedPair]:
    """All pairs that fit, in order."""
    encoded = [encode_pair(tokenizer, pair, max_length) for pair in pairs]
    return keep_fitting(encoded, max_length, what, log)


def encode_sft(tokenizer, texts, max_length: int, log=print) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of the (question, answer) texts that fit, in order."""
    encoded = [encode_example(tokenizer, question, answer) for question, answer in texts]
    fitting = [e if len(e[0]) + len(e[1]) <= max_length else None for e in encoded]
    return keep_fitting(fitting, max_length, "SFT texts", log)
