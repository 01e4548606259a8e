"""Rows of data files: JSON Lines, JSON arrays, parquet, CSV; and the forms of preference rows."""

import gzip
import json
import os
from pathlib import Path

from dpo_minimal import InputError
from dpo_minimal.extras.reading import reading
from dpo_minimal.formats.conversations import (
    ASSISTANT,
    conversation_of,
    in_context,
    is_conversation,
    pack_prompt,
)
from dpo_minimal.formats.csv import read_csv
from dpo_minimal.formats.parquet import read_parquet

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv")
# How prompts begin that are in a chat template already: ChatML, Llama 2, Llama 3, Zephyr.
TEMPLATED = ("<|im_start|>", "[INST]", "<s>[INST]", "<s> [INST]", "<|begin_of_text|>")
TEMPLATED += ("<|start_header_id|>", "<|user|>", "<|system|>")
MAX_LINE = 2**24  # characters: a file of something else may have no end of line
MAX_RATIO = 50  # of a gzipped array, whose unpacked text must fit into memory


# --- files to rows ----------------------------------------------------------------------------


def data_files(path: Path) -> list[Path]:
    """The file itself, or a folder's data files by name; InputError if the folder has none.

    A path such as folder/train* is those of the folder's files that match.
    """
    if not path.is_dir() and "*" not in path.name:
        return [path]
    found = path.iterdir() if path.is_dir() else path.parent.glob(path.name)
    files = sorted(file for file in found if file.name.endswith(SUFFIXES))
    if not files:
        raise InputError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
    return files


def read_rows(path: Path):
    """Yield (place, row dict) from a file of JSON Lines, one JSON array, parquet, or CSV.

    JSON may be gzipped, whatever the file's name. `place` reads "file, line 7". InputError for a
    missing, empty or damaged file, with the place.
    """
    for suffix, reader in ((".parquet", read_parquet), (".csv", read_csv)):
        if path.name.endswith(suffix):
            yield from reader(path)
            return
    with reading(path, "a whole UTF-8 text file"):
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8") as file:
            yield from read_json_rows(path, file)


def read_json_rows(path, file):
    """Yield (place, row) from an open text file. A JSON array is read into memory whole."""
    piece = file.read(2**16)
    while piece and not piece.strip():
        piece = file.read(2**16)
    if not piece:
        raise InputError(f"{path} is empty: it should hold preference pairs as JSON")
    file.seek(0)
    if piece.lstrip().startswith("["):
        most = MAX_RATIO * path.stat().st_size
        text = file.read(most + 1)
        if len(text) > most:
            raise InputError(f"{path}: unpacks to more than {MAX_RATIO} times its size")
        for number, row in enumerate(parse_json(path, text, 1), start=1):
            yield f"{path}, entry {number}", row
        return
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), ""), start=1):
        if len(line) == MAX_LINE:
            raise InputError(f"{path}, line {number}: longer than {MAX_LINE:,} characters")
        if line.strip():
            yield f"{path}, line {number}", parse_json(path, line, number)


def parse_json(path, text: str, first_line: int):
    """The value of a JSON text that starts at `first_line`; InputError names the broken line."""
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        place = f"{path}, line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{place}: broken JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # numbers too long, or nested too deep
        raise InputError(f"{path}, line {first_line}: cannot be read ({error})") from None


# --- rows to pairs ----------------------------------------------------------------------------


def pair_of(place: str, row: dict) -> tuple:
    """(prompt, chosen, rejected) of a row in one of the usual forms, else InputError.

    The prompt is a text or, of a row with messages or with earlier turns, a conversation.
    """
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected an object with a prompt and two answers")
    if is_conversation(row):
        pair = conversation_of(place, row)
    else:
        prompt, *answers = texts_of(place, row)
        pair = in_context(place, row, prompt), *answers
    try:
        "".join((pack_prompt(pair[0]), *pair[1:])).encode()
    except UnicodeEncodeError as error:  # JSON may hold half a surrogate pair, which is no text
        raise InputError(f"{place}: not valid Unicode ({error.reason})") from None
    return pair


def texts_of(place: str, row: dict) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of a row of texts."""
    if "response_j" in row:  # stack-exchange-paired
        names = ("question", "response_j", "response_k")
    else:
        asked = [name for name in ("instruction", "prompt", "question") if name in row]
        names = (asked[0] if asked else "prompt", "chosen", "rejected")
    is_dialogue = names[0] not in row and "chosen" in row and "rejected" in row  # HH-RLHF
    if is_dialogue:
        names = ("chosen", "rejected")
    for name in (*names, "input") if row.get("input") is not None else names:
        if not isinstance(row.get(name), str):
            found = f"is {type(row[name]).__name__}, not text" if name in row else "is missing"
            raise InputError(f"{place}: the field {name!r} {found}; fields are {', '.join(row)}")
    if is_dialogue:
        return split_dialogue(place, row["chosen"], row["rejected"])
    prompt, chosen, rejected = (row[name] for name in names)
    if row.get("input"):  # the material that an instruction is about
        prompt = f"{prompt}\n{row['input']}"
    return question_of(place, prompt), chosen, rejected


def split_dialogue(place: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two dialogues, split after the last "Assistant:" of the beginning that they share."""
    shared = os.path.commonprefix([chosen, rejected])
    cut = shared.rfind(ASSISTANT)
    if cut < 0:
        raise InputError(f"{place}: no prompt, and no beginning with 'Assistant:' that both share")
    prompt = shared[:cut].removeprefix("\n\nHuman:").strip()
    return prompt, chosen[cut + len(ASSISTANT) :].strip(), rejected[cut + len(ASSISTANT) :].strip()


def question_of(place: str, prompt: str) -> str:
    """The bare question, also where a data set already has its prompts in the blog's template.

    InputError if it is in a chat template: another one around it would be what no user writes.
    """
    stripped = prompt.rstrip(" ")
    if stripped.startswith("Question: ") and stripped.endswith("\n\nAnswer:"):
        return stripped[len("Question: ") : -len("\n\nAnswer:")]
    if prompt.lstrip().startswith(TEMPLATED):
        found = f"the prompt is in a chat template already (it begins {prompt.lstrip()[:20]!r})"
        raise InputError(f"{place}: {found}: give the bare question, or a list of messages")
    return prompt
