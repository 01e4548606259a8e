"""Reading files: whatever goes wrong becomes one line that names the file; JSON objects."""

import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from dpo_minimal import InputError


@contextmanager
def reading(path, what: str):
    """Whatever goes wrong within the context is an InputError that names the file.

    For readers that fail in many ways. what: what the file should have been, "a JSON file".
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise InputError(f"{path}: not a regular file")  # a pipe or a device may have no end
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except BaseException as error:  # a panic in Rust is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: not {what} that can be read ({reason})") from None


def unique_keys(pairs: list) -> dict:
    """For json.loads: an object; ValueError for a key that is there twice."""
    if len(dict(pairs)) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} is there twice")
    return dict(pairs)


def read_json(path) -> dict:
    """Read a JSON object; InputError if the file is missing, broken or something else."""
    with reading(path, "a JSON file"):
        value = json.loads(Path(path).read_text("utf-8"), object_pairs_hook=unique_keys)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def first_line(error: BaseException) -> str:
    """What an error says, in a line: its class if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
