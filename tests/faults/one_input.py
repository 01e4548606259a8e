"""One hostile input: made, read, judged. What may happen to it is told in fuzz.py."""

import contextlib
import io
import os
import random
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

import command_lines
import numpy as np
import readers
import readers_data
import readers_text
import spec

from dpo_minimal.extras.command_line import run_command
from dpo_minimal.formats.rows import MAX_RATIO

READERS = {
    "safetensors": readers.safetensors,
    "model": readers.model,
    "shards": readers.shards,
    "bin": readers.bin_file,
    "meta": readers.meta,
    "config": readers_text.config,
    "adapter": readers_text.adapter,
    "sentencepiece": readers_text.sentencepiece,
    "tokenizer.json": readers_text.tokenizer_json,
    "json rows": readers_data.json_rows,
    "parquet": readers_data.parquet,
    "no file": readers_data.no_file,
    "state": readers_data.state,
    "metrics": readers_data.metrics,
    "saved flags": command_lines.saved_run,
}
FLAGS = {"train flags": command_lines.train_flags, "generate flags": command_lines.generate_flags}
NEEDS = {"tokenizer.json": "tokenizers", "parquet": "pyarrow"}
COLUMNS = ("tried", "refused", "accepted", "traceback", "hang", "memory", "lines", "silent")
SECONDS, SLACK = 10, 64e6


def available(names):
    """Those readers whose packages are installed."""
    return [name for name in names if find_spec(NEEDS.get(name, "json"))]


@contextlib.contextmanager
def captured():
    """Within the context stderr, Python's and the process's, goes into a file that it gives."""
    with tempfile.TemporaryFile("w+", errors="backslashreplace") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stderr(file), contextlib.redirect_stdout(io.StringIO()):
                yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def resident(key: str) -> int:
    """Bytes of memory that the process holds (VmRSS), or held at most since `forget` (VmHWM)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def forget():
    """Let the most memory that was held be counted from here on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def same(a, b) -> bool:
    """Whether two values are equal, to the type and to the bit."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.shape(a) == np.shape(b) and np.array_equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def judge(read, expect) -> tuple[str, str]:
    """(outcome, what was said or found) of an input."""
    box = []
    with captured() as file:
        try:
            run_command(lambda: box.append(read()))
            outcome = "accepted"
        except SystemExit as error:
            outcome = "refused" if error.code == 2 else "traceback"
        except BaseException:
            outcome = "traceback"
            traceback.print_exc(limit=-4)
        file.seek(0)
        told = file.read()
    if outcome == "refused" and (told.count("\n") != 1 or len(told) > 4500):
        outcome = "lines"
    if outcome != "accepted":
        return outcome, told
    try:
        wanted = expect()
    except spec.Refuse as why:
        return "silent", f"accepted, but: {why}"
    if wanted is readers_text.EITHER or same(box[0], wanted):
        return "accepted", ""
    return "silent", f"loaded {str(box[0])[:900]}\nbut it is {str(wanted)[:900]}"


def size_of(folder: Path) -> int:
    """Bytes of the regular files of a folder; of a gzipped one, what it may unpack to."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    zipped = {path: path.read_bytes()[:2] == b"\x1f\x8b" for path in files}
    return sum(path.stat().st_size * (MAX_RATIO if zipped[path] else 1) for path in files)


def try_input(name: str, number: int, seed: int, good: Path) -> tuple[str, str]:
    """(outcome, what was said) of one input of a reader; number 0 is a good one."""
    rng = random.Random(f"{seed} {name} {number}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        read, expect = (READERS | FLAGS)[name](rng, Path(folder), good, number > 0)
        size, before, started = size_of(Path(folder)), resident("VmRSS"), time.process_time()
        forget()
        outcome, told = judge(read, expect)
        grown = resident("VmHWM") - before
        if number == 0 and outcome != "accepted":
            return "silent", f"the good input: {outcome}, {told}"
        if time.process_time() - started > SECONDS:
            outcome = "hang"
        if grown > 2 * size + SLACK and number > 0 and outcome in ("accepted", "refused"):
            outcome, told = "memory", f"{grown / 1e6:.0f} MB for {size} bytes"
    return outcome, told


def make_good(folder: Path) -> Path:
    """The good inputs of all readers, in a folder."""
    readers.make_good(folder)
    command_lines.make_good(folder)
    return folder
