"""The tests that you can see. `python -m pytest tests -k p01` runs those of problem 1.

Each file in `checks/` is a call of your code with fixed inputs, and what should come back. The
grader asks the same questions with other inputs, and some more.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from grader import calls  # noqa: E402
from grader.agree import agree  # noqa: E402
from grader.arrays import unpack  # noqa: E402

CHECKS = sorted((HERE / "checks").iterdir())
calls.warm_up()


@pytest.fixture(autouse=True)
def fresh_modules(tmp_path, monkeypatch):
    """Your files are imported anew for each test, which replaces parts of them by stand-ins."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("dpo_minimal", "by_hand"):
            del sys.modules[name]
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("file", CHECKS, ids=[file.name for file in CHECKS])
def test_problem(file):
    message = unpack(file.read_bytes())
    inputs = {name[3:]: value for name, value in message.items() if name.startswith("in ")}
    expected = {name[4:]: value for name, value in message.items() if name.startswith("out ")}
    got = calls.run(message["call"], inputs, message["banned"])
    if message["shape only"]:
        got, expected = shapes(got, expected), shapes(expected, expected)
    difference = agree(got, expected, message["tolerance"])
    if difference:
        pytest.fail(explain(message["said"], difference, inputs, got, expected), pytrace=False)


def shapes(values, names):
    """Arrays as their shapes."""
    return {n: list(values[n].shape) if hasattr(values[n], "shape") else values[n] for n in names}


def explain(said, difference, inputs, got, expected):
    """What was asked, and the numbers where there are few."""
    lines = [said, f"yours: {difference}"]
    for title, values in (("input", inputs), ("expected", expected), ("yours", got)):
        for name, value in values.items():
            if shown := numbers(value):
                lines.append(f"{title:8} {name} = {shown}")
    return "\n".join(lines)


def numbers(value) -> str:
    """A value in print, "" where it has more than 24 numbers."""
    try:
        array = np.asarray(value)
    except ValueError:  # rows of unequal lengths
        return str(value)[:500]
    return np.array2string(array, precision=6) if array.size <= 24 else ""
