"""Submissions that misbehave, read from `hostile.txt`, and which problems may lose points for it.

`self_check.py` grades them all and looks at what they left behind.
"""

from pathlib import Path
from typing import NamedTuple

from problems.all_problems import PROBLEMS
from problems.ladder import Problem
from problems.variants import Variant
from solutions.solved import ASSIGNMENTS, insert, solution


class Hostile(NamedTuple):
    """`code` goes into a function of a file, or to its top; `loses`: problems that lose points."""

    name: str
    file: str
    function: str
    loses: list[str]
    code: str


def read(path: Path) -> list[Hostile]:
    """The file's entries, in order. A line "# name | file | function | problems" begins one."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("# ") and "|" in line:
            parts = (part.strip() for part in line[2:].split("|"))
            name, file, function, loses = ("" if part == "-" else part for part in parts)
            found.append(Hostile(name, file, function, loses.split(", ") if loses else [], ""))
        elif found:
            found[-1] = found[-1]._replace(code=f"{found[-1].code}{line}\n")
    return [hostile._replace(code=hostile.code.strip("\n")) for hostile in found[1:]]


HOSTILE = read(Path(__file__).parent / "hostile.txt")


def hostile_files(hostile: Hostile, canary: Path) -> dict[str, str]:
    """The reference solution with the hostile lines."""
    files = solution(Variant())
    code = hostile.code.replace("{canary}", str(canary)).replace("{grader}", str(ASSIGNMENTS))
    files[hostile.file] = insert(files[hostile.file], hostile.function, code)
    return files


def touched(hostile: Hostile) -> list[Problem]:
    """The problems that share its file, and one that does not."""
    own = [problem for problem in PROBLEMS if hostile.file in problem.files]
    return [*own, next(p for p in PROBLEMS if p not in own and p.name in ("merge", "rotary"))]
