"""Reference solutions as {path: text}, and what spoils them.

A solution is the text of the taught code with some functions replaced, so that it is graded as a
student's is.
"""

import ast
import functools
import inspect
import textwrap
from dataclasses import astuple
from pathlib import Path

import solutions.variants  # noqa: F401
from grader.source import body_of, distinctive, functions, replace_function, statements
from problems.all_problems import PROBLEMS, chosen
from problems.variants import Variant
from solutions.standard import ANSWERS

ASSIGNMENTS = Path(__file__).resolve().parents[1]


def solution(v: Variant) -> dict[str, str]:
    """The files that a perfect student hands in, {path: text}."""
    return dict(cached_solution(v))


@functools.cache
def cached_solution(v: Variant) -> dict[str, str]:
    """`solution`, made once for each variant."""
    paths = {path for problem in PROBLEMS for path in problem.files}
    files = {}
    for path in sorted(paths):
        taught = ASSIGNMENTS.parent / path
        place = taught if taught.exists() else ASSIGNMENTS / "handout" / path
        files[path] = place.read_text("utf-8")
    order = sorted(ANSWERS, key=lambda answer: answer[0] is not None)
    for choice, path, name, function in order:
        if choice is None or choice in astuple(v):
            files[path] = replace_function(files[path], name, inspect.getsource(function))
    return files


def write(folder: Path, files: dict[str, str]) -> Path:
    """A submission in a folder."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, "utf-8")
    return folder


def own_statements(problems) -> set[str]:
    """The distinctive statements of the answers to these problems that `solutions/` adds."""
    holes = {(path, hole) for p in problems for path, own in p.files.items() for hole in own}
    chosen = [function for _, path, name, function in ANSWERS if (path, name) in holes]
    nodes = [ast.parse(inspect.getsource(function)) for function in chosen]
    found = statements(s for node in nodes for s in body_of(functions(node).popitem()[1]))
    return {line for line in found if distinctive(line)}


def spoiled(v: Variant, problem: str, changes) -> dict[str, str]:
    """The reference solution with pieces of one problem's functions replaced.

    changes: (function, old, new) each; LookupError if the old piece is not there.
    """
    files = solution(v)
    (asked,) = chosen([problem])
    for function, old, new in changes:
        for path in asked.files:
            if function in functions(ast.parse(files[path])):
                files[path] = change_within(files[path], function, old, new)
    return files


def change_within(source: str, name: str, old: str, new: str) -> str:
    """Replace a piece of one function's text."""
    node = functions(ast.parse(source))[name]
    lines = source.splitlines(keepends=True)
    own = "".join(lines[node.lineno - 1 : node.end_lineno])
    if old not in own:
        raise LookupError(f"{name}: there is no {old!r} in the reference any more")
    return "".join([*lines[: node.lineno - 1], own.replace(old, new), *lines[node.end_lineno :]])


def insert(source: str, name: str, code: str) -> str:
    """Put lines at the beginning of a function, or of the file where no name is given."""
    lines, at = source.splitlines(), 0
    if name:
        first = body_of(functions(ast.parse(source))[name])[0]
        at, code = first.lineno - 1, textwrap.indent(code, " " * first.col_offset)
    return "\n".join([*lines[:at], code, *lines[at:]]) + "\n"
