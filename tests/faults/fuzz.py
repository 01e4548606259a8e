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
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(path) for path in (HERE, HERE.parent, ROOT) if str(path) not in sys.path]

import command_lines  # noqa: E402
import torch  # noqa: E402
from one_input import COLUMNS, FLAGS, READERS, SECONDS, available, make_good, try_input  # noqa: E402

WAIT = 90  # seconds


def work(pipe, good: str, seed: int):
    """A worker process: (reader, number) in, (outcome, what was said) out."""
    faulthandler.enable()
    torch.set_num_threads(1)
    os.chdir(good)  # nothing is written where the command was started
    with contextlib.suppress(EOFError, BrokenPipeError):  # the end
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
            words += ["--stage=sft"] if is_train and "stage" not in given else []  # the shortest
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
