"""Grade a submission: draw inputs, run it confined, judge what comes back, say what is wrong.

    python assignments/grade.py SUBMISSION [--json results.json] [--problems NAME ...]
        [--variant N] [--seed N] [--hold-back RUNG ...] [--open FOLDER]

The submission is a folder with the files that students change. Its code runs only in child
processes of `grader/worker.py` and returns arrays. Expected values never leave this process.
"""

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from grader.agree import agree, right_shapes
from grader.arrays import LARGEST, pack, unpack
from grader.source import guard_imports, replace_bodies
from problems import open_problem
from problems.all_problems import NUMBERS, PROBLEMS, chosen
from problems.ladder import Check, Problem, draw
from problems.variants import Variant, variant

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent  # the taught code; in the autograder's zip a copy with holes
MEMORY = 2**30  # bytes that a child may take beyond what torch itself has mapped
LARGEST_FILE = 2**20
TAUGHT = ("dpo_minimal/**/*.py", "dpo_minimal/*.json")  # what the package consists of
SWITCHES = ("DisableTorchFunction", "_python_dispatch", "torch.overrides")  # ways around a refusal
AGAIN = 5  # seconds for the other checks of a problem after one has hung


def cut(package: Path, problems) -> dict[str, str]:
    """The package's files as students get them, {path: text}; holes raise NotImplementedError."""
    paths = sorted(path for pattern in TAUGHT for path in package.glob(pattern))
    files = {str(p.relative_to(package)): p.read_text("utf-8") for p in paths}
    for problem in problems:
        if problem.template:
            files[problem.template] = (HERE / "handout" / problem.template).read_text("utf-8")
        asked = f"Problem {NUMBERS[problem.name]}: {problem.title}"
        for path, holes in problem.files.items():
            said = f'raise NotImplementedError("{asked}")'
            files[path] = replace_bodies(files[path], dict.fromkeys(holes, said))
            files[path] = guard_imports(files[path], problem.at_import)
        for path, helpers in problem.helpers.items():
            said = f'raise NotImplementedError("{asked}; this helper is optional")'
            files[path] = replace_bodies(files[path], dict.fromkeys(helpers, said))
    return files


def submitted(folder: Path, path: str) -> str | None:
    """The text of a submitted file, found at its path or by its name, also one folder deeper."""
    name = Path(path).name
    folders = [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]
    for place in (f / p for f in folders for p in (path, name, f"dpo_minimal/{name}")):
        with suppress(OSError, RuntimeError):  # links in a loop, files that may not be read
            plain_file = place.is_file() and not place.is_symlink()
            inside = folder.resolve() in place.resolve().parents
            if plain_file and inside and place.stat().st_size <= LARGEST_FILE:
                return place.read_bytes().decode("utf-8", "replace")
    return None


class Grader:
    """A worker process and a temporary folder for any number of submissions."""

    def __init__(self, v: Variant = Variant(), seed: int = 0, problems=PROBLEMS, package=PACKAGE):  # noqa: B008
        self.v, self.seed, self.problems = v, seed, problems
        self.empty = cut(package, problems)
        self.layers: set[str] = set()
        self.inputs = {}

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="grade-"))
        self.folder.chmod(0o711)
        names = ("PATH", "LANG", "SYSTEMROOT", "LD_LIBRARY_PATH")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-I", "-B", HERE / "grader" / "worker.py"]
        pipe = subprocess.PIPE
        self.worker = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=self.folder
        )
        return self

    def __exit__(self, *error):
        self.worker.stdin.close()
        self.worker.wait()
        self.worker.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def grade(self, submission: Path) -> list[dict]:
        """Grade all problems: their rungs, each {problem, rung, score, max, output, visible}."""
        return [row for problem in self.problems for row in self.grade_problem(submission, problem)]

    def grade_problem(self, submission: Path, problem: Problem) -> list[dict]:
        """Grade one problem: its files are the submission's, all others are as handed out."""
        own = {path: submitted(submission, path) for path in problem.files}
        missing = [path for path, text in own.items() if text is None]
        files = self.empty | {path: text for path, text in own.items() if text is not None}
        inputs = self.draw(problem)
        results = {} if len(missing) == len(own) else self.run(problem, files, inputs)
        rows = []
        tricks = [
            word
            for word in SWITCHES
            if problem.banned and word in "".join(filter(None, own.values()))
        ]
        for check in problem.checks:
            got, again = results.get(check.rung, {}), results.get(f"{check.rung} again", {})
            if len(missing) == len(own):
                got = {"error": f"{missing[0]} was not handed in"}
            if tricks:
                got = {"error": f"{tricks[0]} has no place in a submission"}
            output = judge(problem, check, inputs[check.rung], got, again, self.v)
            row = {"problem": problem.name, "rung": check.rung, "max": check.points}
            row |= {"score": 0 if output else check.points, "visible": check.visible}
            rows.append(row | {"output": output or "Right."})
        return rows

    def draw(self, problem: Problem) -> dict[str, dict]:
        """A problem's inputs, the same for all submissions: drawing takes longer than grading."""
        key = problem.name, self.v
        if key not in self.inputs:
            self.inputs[key] = draw(problem, self.v, self.seed)
        return self.inputs[key]

    def run(self, problem: Problem, files: dict[str, str], inputs: dict) -> dict[str, dict]:
        """What each check returned, by name. A child that hangs or dies costs one check."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        place.chmod(0o711)
        tree = place / "tree"
        for path, text in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text, "utf-8")
        left, results, seconds = list(inputs), {}, problem.seconds
        while left and seconds:
            status, found = self.run_child(problem, place, {n: inputs[n] for n in left}, seconds)
            results |= found
            left = [name for name in left if name not in found]
            if left:  # the first one without a result was running when the child ended
                name, late = left.pop(0), status == "time"
                why = f"took more than {seconds} s" if late else f"the process ended ({status})"
                results[name] = {"error": why}
                # A second hang ends the problem.
                seconds = (AGAIN if seconds == problem.seconds else 0) if late else seconds
        shutil.rmtree(place, ignore_errors=True)
        return results | {name: {"error": "not reached in time"} for name in left}

    def run_child(self, problem: Problem, place: Path, inputs: dict, seconds: int):
        """Let the worker run one child. Returns how it ended and {check: what it left}."""
        scratch = Path(tempfile.mkdtemp(dir=place))
        (scratch / "out").mkdir(mode=0o777)
        (scratch / "out").chmod(0o777)
        names = {name: f"{i}" for i, name in enumerate(inputs)}
        files = []
        for name, values in inputs.items():
            files.append(str(place / f"input {names[name]}"))
            call = next(c.call for c in problem.checks if c.rung == name.removesuffix(" again"))
            Path(files[-1]).write_bytes(pack({"call": call, **values}))
        job = {"scratch": str(scratch), "tree": str(place / "tree"), "inputs": files}
        job |= {"checks": list(names.values()), "banned": list(problem.banned)}
        job |= {"seconds": seconds, "memory": MEMORY}
        self.worker.stdin.write(json.dumps(job) + "\n")
        self.worker.stdin.flush()
        answer = json.loads(self.worker.stdout.readline())
        self.layers = set(answer["layers"].split())
        found = {name: read_result(scratch / "out" / file) for name, file in names.items()}
        return answer["status"], {name: result for name, result in found.items() if result}


def read_result(path: Path) -> dict | None:
    """Read a result file, if it is a plain one of decent size; a child may put anything there."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(file, "rb") as opened:
        status = os.fstat(file)
        if not os.path.stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= LARGEST:
            return None
        with suppress(ValueError, OSError, MemoryError):
            return unpack(opened.read(LARGEST)) or None
    return {"error": "what came back cannot be read"}


def judge(problem: Problem, check: Check, inputs, got: dict, again: dict, v: Variant) -> str | None:
    """None if the rung is reached, else the feedback."""
    if got.get("empty") is True:  # not just true: a child may have written anything
        return "Not written yet."
    if "error" in got or not got:
        error, place = printable(got.get("error", "gave nothing back")), got.get("place")
        place = f" ({printable(place)})" if isinstance(place, str) and place else ""
        return f"{check.said} Yours: {error}{place}."
    with np.errstate(all="ignore"):
        expected = check.expect(inputs, v)
        if check.rung == "shape":
            difference = right_shapes(got, again, expected)
        else:
            difference = agree(got, expected, check.tolerance)
        if difference is None:
            return None
        bug = likely_bug(problem, check, inputs, got, expected, v)
    return f"{check.said} Yours: {printable(difference)}." + (f" Likely: {bug}" if bug else "")


def likely_bug(problem: Problem, check: Check, inputs, got, expected, v: Variant) -> str | None:
    """The feedback on the usual mistake that gives exactly these numbers, if there is one."""
    tolerance = max(check.tolerance, 1e-4) if check.tolerance else 0
    for bug, said in problem.bugs.items():
        mistaken = check.expect(inputs, v, bug)
        same_as_right = agree(mistaken, expected, check.tolerance) is None
        if not same_as_right and agree(got, mistaken, tolerance) is None:
            return said
    return None


def printable(text) -> str:
    """What a submission said, as one short line."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:300].rstrip(". ")


def results_of(rows: list[dict], hold_back=(), seconds=0.0, note="") -> dict:
    """The content of results.json. Students see held-back rungs once grades are published."""
    titles = {problem.name: problem.title for problem in PROBLEMS}
    tests = []
    for row in rows:
        number = NUMBERS.get(row["problem"], "Open")
        held = row["rung"] in hold_back
        tests.append(
            {
                "name": f"{number}. {titles.get(row['problem'], row['problem'])}: {row['rung']}",
                "score": row["score"],
                "max_score": row["max"],
                "status": "passed" if row["score"] == row["max"] else "failed",
                "output": row["output"],
                "visibility": "after_published" if held else "visible",
            }
        )
    return {
        "score": sum(row["score"] for row in rows),
        "execution_time": round(seconds, 1),
        "output": note,
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "tests": tests,
    }


def report(rows: list[dict]) -> str:
    """The rungs as text, problem by problem."""
    lines, titles = [], {problem.name: problem.title for problem in PROBLEMS}

    def total(rows):
        return f"{sum(r['score'] for r in rows):g}/{sum(r['max'] for r in rows):g}"

    for name in dict.fromkeys(row["problem"] for row in rows):
        own = [row for row in rows if row["problem"] == name]
        lines.append(f"{NUMBERS.get(name, 'Open')}. {titles.get(name, name)}: {total(own)}")
        failed = [row for row in own if row["score"] < row["max"]]
        lines += [f"   {row['rung']} ({row['max']:g}): {row['output']}" for row in failed]
    return "\n".join([*lines, f"total {total(rows)}"])


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("submission", type=Path)
    parser.add_argument("--json", type=Path, help="write Gradescope's results.json")
    parser.add_argument("--problems", nargs="+", help="names or numbers; all by default")
    parser.add_argument("--variant", type=int, default=0)
    parser.add_argument("--seed", type=int, help="of the inputs; a secret new one by default")
    parser.add_argument("--hold-back", nargs="+", default=(), help="rungs not shown to students")
    parser.add_argument("--open", type=Path, help="base/, sft/ of the open problem; graded too")
    args = parser.parse_args()
    started = time.perf_counter()
    seed = secrets.randbits(32) if args.seed is None else args.seed
    with Grader(variant(args.variant), seed, chosen(args.problems)) as grader:
        rows = grader.grade(args.submission)
    if args.open:
        rows += open_problem.grade(args.submission, args.open, seed)
    lacking = {"files", "calls"} - grader.layers
    note = f"seed {seed}, confined by {', '.join(sorted(grader.layers)) or 'nothing'}"
    print(report(rows))
    print(note + (f"; LACKING {', '.join(sorted(lacking))}: see README.md" if lacking else ""))
    if args.json:
        results = results_of(rows, args.hold_back, time.perf_counter() - started)
        partial = args.json.with_name(args.json.name + ".part")
        partial.write_text(json.dumps(results, indent=1), "utf-8")
        partial.replace(args.json)


if __name__ == "__main__":
    main()
