"""Check on your machine what README.md says of the grader. All parts together take a while.

    python assignments/self_check.py [reference] [wrong] [hostile] [handout] [variants]

reference  full points for several seeds; nothing for the empty handout
wrong      each plausible wrong solution loses its rungs and no others, and is told its mistake
hostile    no submission gets a wrong point, ends the grader or touches anything outside
handout    the visible tests pass on the reference and fail on the handout; train.py runs there
variants   full points for the reference of every variant
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grade import Grader
from make_handout import make
from problems.all_problems import PROBLEMS
from problems.variants import COUNT, Variant, variant
from solutions import solved
from solutions.hostile import HOSTILE, hostile_files, touched
from solutions.wrong import WRONG, check_wrong


def lost(rows) -> set[str]:
    """The problems that lost points."""
    return {row["problem"] for row in rows if row["score"] < row["max"]}


def check_reference() -> int:
    failures = 0
    for seed in range(10):
        with tempfile.TemporaryDirectory() as folder, Grader(Variant(), seed) as grader:
            place = solved.write(Path(folder), solved.solution(Variant()))
            started = time.perf_counter()
            wrong = lost(grader.grade(place))
            seconds = time.perf_counter() - started
            failures += bool(wrong)
            print(f"seed {seed}: {wrong or 'all points'} in {seconds:.1f} s")
    return failures


def check_variants() -> int:
    failures = 0
    for number in range(COUNT):
        with tempfile.TemporaryDirectory() as folder, Grader(variant(number), number) as grader:
            place = solved.write(Path(folder), solved.solution(variant(number)))
            wrong = lost(grader.grade(place))
            failures += bool(wrong)
            print(f"variant {number}: {wrong or 'all points'}")
    return failures


def check_wrongs() -> int:
    failures = 0
    for seed in (1, 2, 3):
        with Grader(Variant(), seed) as grader:
            for wrong in WRONG:
                complaint = check_wrong(grader, wrong)
                failures += complaint is not None
                if complaint:
                    print(f"seed {seed}: {complaint}")
    print(f"{len(WRONG)} wrong solutions, three seeds each, {failures} complaints")
    return failures


def check_hostile() -> int:
    failures, layers = 0, set()
    with tempfile.TemporaryDirectory() as folder:
        for hostile in HOSTILE:
            started = time.perf_counter()
            said, layers = grade_hostile(hostile, Path(folder))
            failures += bool(said)
            seconds = time.perf_counter() - started
            print(f"{hostile.name}: {'; '.join(said) or 'as it should'} ({seconds:.1f} s)")
    print(f"{len(HOSTILE)} hostile submissions, {failures} complaints; {sorted(layers)}")
    return failures


def grade_hostile(hostile, folder: Path):
    """(what is wrong after grading it, the layers that confined it)."""
    canary, place = folder / "canary", folder / hostile.name
    canary.write_text("untouched")
    canary.chmod(0o600)
    solved.write(place, hostile_files(hostile, canary))
    before = traces(canary, place)
    with Grader(Variant(), 5, touched(hostile)) as grader:
        rows = grader.grade(place)
    amiss = {
        f"lost {lost(rows) or 'nothing'}": lost(rows) != set(hostile.loses),
        "something outside was touched": before != traces(canary, place),
        "something was left behind": grader.folder.exists() or "sleep 4242" in running(),
        "it reads the grader's files": any("I CAN READ" in row["output"] for row in rows),
        "what it is told cannot be printed": not all(row["output"].isprintable() for row in rows),
    }
    return [text for text, true in amiss.items() if true], grader.layers


def traces(canary: Path, place: Path) -> list:
    """What a submission could have changed: the canary, its own files, the system's folders."""
    status = canary.stat() if canary.exists() else None
    own = sorted((p, p.stat().st_mtime_ns) for p in place.rglob("*"))
    marks = [p for p in (Path("/tmp/hostile"), Path("/etc/hostile")) if p.exists()]
    return [status and (status.st_mode, status.st_mtime_ns, canary.read_text()), own, marks]


def running() -> str:
    """The command lines of all processes."""
    found = ""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += path.read_bytes().decode("utf-8", "replace").replace("\0", " ") + "\n"
        except OSError:
            continue
    return found


def check_handout() -> int:
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in (0, COUNT - 1):
            out = Path(folder) / str(number)
            make(out, list(PROBLEMS), variant(number))
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
            quiet = {"cwd": out, "capture_output": True, "text": True}
            empty = subprocess.run(command, **quiet).stdout.splitlines()[-1]
            solved.write(out, solved.solution(variant(number)))
            full = subprocess.run(command, **quiet).stdout.splitlines()[-1]
            failures += "passed" in empty or "failed" in full
            print(f"handout of variant {number}: {empty}; with the solution: {full}")
        # In the last one: the stages run whatever a variant asks for.
        for stage in ("pretrain", "sft", "dpo"):
            flags = ("--out", "run", "--stage", stage, "--max-steps", "2")
            done = subprocess.run([sys.executable, "train.py", *flags], **quiet)
            failures += done.returncode != 0
            said = (done.stdout + done.stderr).splitlines()[-1]
            print(f"train.py --stage {stage} there: status {done.returncode}; {said}")
    return failures


CHECKS = {
    "reference": check_reference,
    "wrong": check_wrongs,
    "hostile": check_hostile,
    "handout": check_handout,
    "variants": check_variants,
}


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    sys.exit(sum(CHECKS[name]() for name in sys.argv[1:] or CHECKS) > 0)
