"""Try the faults that were once found in this project again, from the real command line.

    python tests/faults/replay.py                  every case, some minutes
    python tests/faults/replay.py --rows 1 3 8     only these rows
    python tests/faults/replay.py --real           each in a new python, which imports torch first

Prints a Markdown table: row, case, exit status, the last line on stderr, verdict. A case that must
be refused ends with status 2 and one line, no traceback, in less than ten CPU-seconds; others say
what they want. Needs Linux; some cases need root (a full disk), pyarrow or tokenizers, and say so.
"""

import argparse
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 10  # of CPU that a case may take
REAL = "--real" in sys.argv
HANG = 120  # seconds after which it hangs
WORK = []  # (make_place, number, Case)


@dataclass
class Done:
    """What a process left: its status, output, CPU-seconds and peak memory in MB."""

    status: int
    out: str
    err: str
    cpu: float
    megabytes: float


@dataclass
class Case:
    """A fault: its row and name, and `try_it(place)`, which returns a Done and what is wrong."""

    row: int
    name: str
    try_it: object


class Skip(Exception):
    """This case cannot be tried here."""


@dataclass
class Place:
    """A folder for one case, with a model folder and a data file that it may damage."""

    folder: Path
    model: Path
    data: Path

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def flags(self, *more):
        """The flags of a small run; later ones win."""
        small = "--batch-size 2 --grad-accum 1 --max-steps 3 --max-length 96 --save-every 1"
        usual = ["--model", self.model, "--data", self.data, "--out", self.out, *small.split()]
        return [*usual, *more]

    def train(self, *flags, **options) -> Done:
        """`python train.py` with these flags."""
        return launch(self.folder, [ROOT / "train.py", *flags], **options)


class Forked:
    """A copy of this process, whose imports are done, that runs python's words; like a Popen."""

    def __init__(self, words, out: int, err: int, limits, env, cwd):
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            for number, handle in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
                os.dup2(handle, number)
            os.chdir(cwd)
            os.environ |= env
            tempfile.tempdir = None  # TMPDIR may have changed
            for limit in limits:
                resource.setrlimit(*limit)
            status = execute(words)
        finally:
            os._exit(status)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


def execute(words) -> int:
    """Do what `python WORDS` does, and return its exit status."""
    status = 0
    try:
        module, sys.argv = words[0] == "-m", words[1:] if words[0] == "-m" else words
        run = runpy.run_module if module else runpy.run_path
        run(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        print("Traceback: BrokenPipeError at exit", file=sys.stderr)
    sys.stderr.flush()
    return status


def begin(folder: Path, words, limits=(), env=(), stdout=None, cwd=ROOT, real=REAL):
    """Start python with these words; its output goes to files in `folder`.

    real: as a new process, which imports torch first; otherwise as a copy of this one.
    """
    words = list(map(str, words))
    env = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | dict(env)
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        out = stdout or out
        if not real:
            return Forked(words, out.fileno(), err.fileno(), limits, env, cwd)
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=cwd,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            preexec_fn=lambda: [resource.setrlimit(*limit) for limit in limits],
        )


def end(folder: Path, process) -> Done:
    """Wait for a process, but not for ever."""
    began, pid = time.monotonic(), 0
    while not pid:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        if not pid and time.monotonic() - began > HANG:
            process.kill()
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    out, err = ((folder / name).read_text("utf-8", "replace") for name in ("out", "err"))
    cpu = used.ru_utime + used.ru_stime
    return Done(process.returncode, out, err, cpu, used.ru_maxrss / 1024)


def launch(folder: Path, words, **options) -> Done:
    """Run python to its end."""
    return end(folder, begin(folder, words, **options))


def refused(done: Done, says: str = "") -> str:
    """What is wrong with a refusal; progress on stderr, which is indented, does not count."""
    lines = [line for line in done.err.splitlines() if not line.startswith("  ")]
    wrong = [] if done.status == 2 else [f"status {done.status}"]
    if "Traceback" in done.err + done.out:
        wrong.append("traceback")
    if len(lines) != 1 or not lines[0].startswith("error: "):
        wrong.append(f"{len(lines)} lines")
    if says not in done.err:
        wrong.append(f"does not say {says!r}")
    if done.cpu > SECONDS:
        wrong.append(f"{done.cpu:.0f} CPU-seconds")
    return ", ".join(wrong)


def ran(done: Done, says: str = "", status: int = 0) -> str:
    """What is wrong with a run that should end well."""
    wrong = [] if done.status == status else [f"status {done.status}"]
    if "Traceback" in done.err + done.out:
        wrong.append("traceback")
    if says not in done.out + done.err:
        wrong.append(f"does not say {says!r}")
    return ", ".join(wrong)


def main():
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import replay_cases

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", help="only these rows")
    parser.add_argument("--real", action="store_true", help="start python anew for each case")
    args = parser.parse_args()
    cases = [c for c in replay_cases.all_cases() if not args.rows or c.row in args.rows]
    with tempfile.TemporaryDirectory() as folder:
        make_place = replay_cases.place_maker(Path(folder))
        WORK[:] = [(make_place, number, case) for number, case in enumerate(cases)]
        with multiprocessing.get_context("fork").Pool(2) as pool:  # they inherit WORK
            results = pool.map(attempt, range(len(cases)), chunksize=1)
    print("\n| row | case | status | its last line | verdict |\n|---|---|---|---|---|")
    for case, (status, line, verdict) in zip(cases, results, strict=True):
        cells = [str(case.row), f"`{case.name}`", str(status), line, verdict]
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    count = {kind: sum(v.startswith(kind) for _, _, v in results) for kind in ("good", "skip")}
    bad = len(cases) - sum(count.values())
    print(f"\n{len(cases)} cases: {count['good']} good, {bad} bad, {count['skip']} skipped")
    sys.exit(1 if bad else 0)


def attempt(number: int) -> tuple:
    """(status, last line on stderr, verdict) of a case of WORK."""
    make_place, number, case = WORK[number]
    place = make_place(number)
    try:
        done, wrong = case.try_it(place)
    except Skip as skip:
        return "-", "", f"skipped: {skip}"
    except Exception as error:
        return "-", "", f"BAD: could not be tried: {error!r}"
    line = (done.err.strip().splitlines() or done.out.strip().splitlines() or [""])[-1]
    line = line.replace(str(place.folder), "DIR")
    verdict = f"BAD: {wrong}" if wrong else f"good ({done.cpu:.1f} s)"
    print(f"{case.row:3} {case.name}: {done.status} {verdict}\n      {line[:300]}", flush=True)
    return done.status, line[:300], verdict


if __name__ == "__main__":
    sys.modules["replay"] = sys.modules["__main__"]  # the cases import this file
    main()
