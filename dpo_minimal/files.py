"""Files that are whole or not there: each is written beside its place and renamed into it."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from dpo_minimal import InputError


@contextmanager
def whole_file(path):
    """A binary file to write, renamed to `path` if all went well and removed if not.

    InputError if the system does not let it be written: what was at `path` is still there then.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a power cut after the rename must not leave an empty file
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path):
    """An empty folder to fill, renamed to `path` if all went well and removed if not."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in filter(Path.is_file, partial.rglob("*")):
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path, value):
    """Write a value as an indented JSON file."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def write_sealed(path, data: bytes):
    """Write bytes behind their SHA-256, so that `read_sealed` notices any damage."""
    with whole_file(path) as file:
        file.write(hashlib.sha256(data).digest())
        file.write(data)


def read_sealed(path) -> bytes:
    """What `write_sealed` wrote; InputError if a byte of it has changed."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise InputError(f"{path}: damaged; delete it, and --resume computes it again")
    return data[32:]
