"""Plausible wrong solutions, read from `wrong.txt`, and what the grader must say about them.

Many are those of tests/bugs.py, in the places where students would put them.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

from problems.all_problems import chosen
from solutions import solved


class Wrong(NamedTuple):
    """Changes (function, old, new) of the reference; `bug` "-": no mistake has to be named."""

    problem: str
    bug: str
    loses: str
    changes: list[tuple[str, str, str]]


def read(path: Path) -> list[Wrong]:
    """The file's entries, in order."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("# ") and "|" in line:
            found.append(Wrong(*(part.strip() for part in line[2:].split("|")), []))
        elif line.startswith("@ ") and found:
            found[-1].changes.append((line[2:], [], []))
        elif line[:1] in ("-", "+") and found:
            found[-1].changes[-1]["-+".index(line[0]) + 1].append(line[2:])
    return [w._replace(changes=[(f, *map("\n".join, c)) for f, *c in w.changes]) for w in found[1:]]


WRONG = read(Path(__file__).parent / "wrong.txt")


def check_wrong(grader, wrong: Wrong) -> str | None:
    """What is wrong with how it is graded, or None."""
    (problem,) = chosen([wrong.problem])
    files = solved.spoiled(grader.v, wrong.problem, wrong.changes)
    with tempfile.TemporaryDirectory() as folder:
        rows = grader.grade_problem(solved.write(Path(folder), files), problem)
    rungs = {row["rung"] for row in rows}
    lost = {row["rung"] for row in rows if row["score"] < row["max"]}
    named = set(wrong.loses.removeprefix("all but ").split(", "))
    expected = rungs - named if wrong.loses.startswith("all but ") else named
    expected = rungs if wrong.loses == "all" else expected
    if lost != expected or not lost:
        return f"{wrong.problem}, {wrong.bug}: loses {', '.join(lost)}, not {wrong.loses}"
    if wrong.bug != "-" and not any(problem.bugs[wrong.bug] in row["output"] for row in rows):
        said = next(row["output"] for row in rows if row["score"] < row["max"])
        return f"{wrong.problem}, {wrong.bug}: not recognized, but: {said}"
    return None
