"""Seeded fuzz of every reader and every flag: python tests/faults/fuzz.py --inputs 3000 --flags 300

Each input is a good one with one to three things wrong, written to an empty folder and read through
a public entry, under the same handler of errors that the command lines have. What may happen:

- It is refused: exit status 2 and exactly one line on stderr.
- It is accepted. Then what was loaded must be equal to what an independent reading of the same
  bytes gives (spec.py, by the format's definition, in plain Python and NumPy), and that reading
  must not refuse it. Anything else is a SILENT ACCEPTANCE. So whatever was changed either shows in
  the loaded value, or is documented as ignored: NO_EFFECT and keys with a "_" in front
  (config.json), settings that are switched off (None, False, 0, empty), settings of a finished
  adapter that change no number, fields of a data row that are not part of its form, lines of
  metrics.jsonl that are cut off. Where the definition is another package's own (tokenizer.json,
  conversations), only the rest is asked. A changed byte of a weight is another weight: the formats
  have no check sums.
- A TRACEBACK: any other exception, and the end of the process (a panic, an abort, a segfault).
- A HANG: over 10 seconds of work, or no answer in 90. MEMORY: beyond twice the file's size and
  64 MB more; a gzipped file counts as what it may unpack to.

Inputs run in a worker process, so that what kills it is seen and counted. Input 0 of each reader is
the good one, which must be accepted. Exit status 1 if anything is not as it should be.
"""

import argparse
import contextlib
import faulthandler
import io
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(path) for path in (HERE, HERE.parent, ROOT) if str(path) not in sys.path]

import command_lines  # noqa: E402
import numpy as np  # noqa: E402
import readers  # noqa: E402
import readers_text  # noqa: E402
import spec  # noqa: E402
import torch  # noqa: E402

from dpo_minimal.extras.command_line import run_command  # noqa: E402
from dpo_minimal.formats.rows import MAX_RATIO  # noqa: E402

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
    "json rows": readers_text.json_rows,
    "parquet": readers_text.parquet,
    "no file": readers_text.no_file,
    "state": readers_text.state,
    "metrics": readers_text.metrics,
    "saved flags": command_lines.saved_run,
}
FLAGS = {"train flags": command_lines.train_flags, "generate flags": command_lines.generate_flags}
NEEDS = {"tokenizer.json": "tokenizers", "parquet": "pyarrow"}
COLUMNS = ("tried", "refused", "accepted", "traceback", "hang", "memory", "lines", "silent")
SECONDS, WAIT, SLACK = 10, 90, 64e6


def available(names):
    """Those readers whose packages are installed."""
    return [name for name in names if find_spec(NEEDS.get(name, "json"))]


# --- one input --------------------------------------------------------------------------------


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


# --- many inputs ------------------------------------------------------------------------------


def work(pipe, good: str, seed: int):
    """A worker process: (reader, number) in, (outcome, what was said) out."""
    faulthandler.enable()
    torch.set_num_threads(1)
    os.chdir(good)  # nothing is written where the command was started
    with contextlib.suppress(EOFError):  # the end
        while True:
            pipe.send(try_input(*pipe.recv(), seed, Path(good)))


def cpu_seconds(process: int) -> float:
    """Processor time that a process has had so far; 0 where the system does not tell."""
    path = Path(f"/proc/{process}/stat")
    if not path.exists():
        return 0.0
    after_name = path.read_text().rpartition(")")[2].split()
    return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


class Worker:
    """A worker process that is started anew when it hangs or dies."""

    def __init__(self, good: Path, seed: int):
        self.arguments, self.process = (str(good), seed), None

    def ask(self, name: str, number: int) -> tuple[str, str]:
        """What became of an input."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, other = context.Pipe()
            arguments = (other, *self.arguments)
            self.process = context.Process(target=work, args=arguments, daemon=True)
            self.process.start()
            other.close()
            self.pipe.send(("adapter", 0))  # answered once everything is imported
            self.pipe.recv()
        self.pipe.send((name, number))
        started, used = time.perf_counter(), cpu_seconds(self.process.pid)
        try:
            # On a busy machine 10 seconds of a process's own time may be minutes.
            while time.perf_counter() - started < WAIT:
                if self.pipe.poll(1):
                    return self.pipe.recv()
                if cpu_seconds(self.process.pid) - used > SECONDS:
                    break
            outcome = ("hang", f"no answer in {time.perf_counter() - started:.0f} seconds")
        except (EOFError, ConnectionError):
            self.process.join()
            outcome = ("traceback", f"the process ended with status {self.process.exitcode}")
        self.process.kill()
        self.process.join()
        self.process = None
        return outcome


def real_commands(good: Path, count: int, seed: int):
    """Yield (outcome, told) of real processes: train.py and generate with flags from the fuzz."""
    for number in range(1, count + 1):
        rng, is_train = random.Random(f"{seed} real {number}"), number % 2
        table = command_lines.TRAIN if is_train else command_lines.GENERATE
        given = {"model": str(good / "model"), "data": str(good / "rows.jsonl")}
        given = given if is_train else {"model": str(good / "model"), "prompt": "Is it?"}
        given = command_lines.draw(rng, table, given, True)
        words = [f"--{k}={v}" for k, v in given.items()]
        with tempfile.TemporaryDirectory() as folder:
            script = [str(ROOT / "train.py")] if is_train else ["-m", "dpo_minimal.generate"]
            words += [f"--out={folder}/run"] if is_train and "out" not in given else []
            words += ["--max-steps=1"] if is_train else ["--max-new-tokens=2"]
            words = [sys.executable, *script, *(os.fsencode(w) for w in words)]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            options = dict(cwd=folder, env=environment, capture_output=True, timeout=120)
            try:
                done = subprocess.run(words, **options)
            except subprocess.TimeoutExpired:
                yield "hang", str(words)
                continue
        told, outcome = done.stderr.decode(errors="replace"), "traceback"
        if done.returncode == 0:
            outcome = "accepted"
        elif done.returncode == 2:
            outcome = "refused" if told.count("\n") == 1 else "lines"
        yield outcome, f"{words}\n{told}"


def table_of(counts: dict) -> str:
    """The table that the command ends with."""
    lines = [f"{'':16}" + "".join(f"{column:>10}" for column in COLUMNS)]
    total = {column: sum(row[column] for row in counts.values()) for column in COLUMNS}
    for name, row in (counts | {"together": total}).items():
        lines.append(f"{name:16}" + "".join(f"{row[column]:>10}" for column in COLUMNS))
    return "\n".join(lines)


def main():
    """The command."""
    parser = argparse.ArgumentParser(description="Fuzz of every reader and every flag.")
    parser.add_argument("--inputs", type=int, default=3000)
    parser.add_argument("--flags", type=int, default=300)
    parser.add_argument("--commands", type=int, default=24, help="real processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one reader")
    parser.add_argument("--number", type=int, help="one input of it, here and now")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good = make_good(Path(folder))
        if args.number is not None:
            print(*try_input(args.only, args.number, args.seed, good))
            return
        names = [args.only] if args.only else available([*READERS, *FLAGS])
        per = {n: args.inputs // len(READERS) if n in READERS else args.flags // 2 for n in names}
        counts = {name: dict.fromkeys(COLUMNS, 0) for name in names}
        worker, shown = Worker(good, args.seed), time.perf_counter()
        for name in names:
            for number in range(per[name] + 1):
                count(counts[name], *worker.ask(name, number), f"--only {name!r} --number {number}")
                if time.perf_counter() - shown > 4:
                    shown = time.perf_counter()
                    print(f"{name}: {number} of {per[name]}", flush=True)
        if args.commands and not args.only:
            counts["real commands"] = dict.fromkeys(COLUMNS, 0)
            for number, found in enumerate(real_commands(good, args.commands, args.seed)):
                count(counts["real commands"], *found, f"command {number}")
                print(f"real commands: {number + 1} of {args.commands}", flush=True)
    print(table_of(counts))
    bad = sum(row[column] for row in counts.values() for column in COLUMNS[3:])
    raise SystemExit(1 if bad else 0)


def count(row: dict, outcome: str, told: str, where: str):
    """Enter an outcome into its row of the table; tell what is not as it should be."""
    row["tried"] += 1
    row[outcome] += 1
    if outcome in COLUMNS[3:]:
        print(f"{outcome}: {where}\n    " + told.strip().replace("\n", "\n    ")[:1800], flush=True)


if __name__ == "__main__":
    main()
