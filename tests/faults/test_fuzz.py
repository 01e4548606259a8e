"""A few seeded inputs of each reader and of the flags; the command fuzz.py tries thousands.

What is asked of each, and how an acceptance is judged, is told in fuzz.py.
"""

import signal
import sys

import one_input
import pytest
import spec

from dpo_minimal import InputError
from dpo_minimal.extras.reading import reading

EACH, SEED = 8, 1


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folder of good inputs."""
    return one_input.make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture(autouse=True)
def in_time():
    """An input that hangs is interrupted, where the system has alarms."""

    def give_up(number, frame):
        raise KeyboardInterrupt("hangs")  # which no reader takes for a damaged file

    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(60)
    yield
    if hasattr(signal, "SIGALRM"):
        signal.alarm(0)


@pytest.mark.parametrize("name", one_input.READERS | one_input.FLAGS)
def test_hostile_inputs_are_refused_in_one_line_or_read_as_the_definition_says(
    monkeypatch, good, name
):
    pytest.importorskip(one_input.NEEDS.get(name, "json"))
    monkeypatch.chdir(good)
    outcomes = {number: one_input.try_input(name, number, SEED, good) for number in range(EACH + 1)}
    bad = {number: found for number, found in outcomes.items() if found[0] in one_input.COLUMNS[3:]}
    assert not bad, f"{name}: seed {SEED}"
    assert outcomes[0][0] == "accepted"


def test_an_acceptance_is_silent_if_the_independent_reading_differs_or_refuses(capfd):
    def refuse():
        raise spec.Refuse("never")

    def shout():
        print("two\nlines", file=sys.stderr)
        raise SystemExit(2)

    def end():
        raise KeyError("x")

    assert one_input.judge(lambda: [1, 2.0], lambda: [1, 2.0]) == ("accepted", "")
    assert one_input.judge(lambda: {"tied": True}, lambda: {"tied": 1})[0] == "silent"
    assert one_input.judge(lambda: [1], refuse) == ("silent", "accepted, but: never")
    assert one_input.judge(shout, refuse) == ("lines", "two\nlines\n")
    assert one_input.judge(end, refuse)[0] == "traceback"


def test_what_another_language_panics_with_is_one_line_and_ctrl_c_is_not(tmp_path):
    class Panic(BaseException):
        """As the one of packages in Rust."""

    said = "^file: not a tokenizer that can be read .index out of bounds.$"
    with pytest.raises(InputError, match=said), reading("file", "a tokenizer"):
        raise Panic("index out\nof bounds")
    with pytest.raises(KeyboardInterrupt), reading("file", "a tokenizer"):
        raise KeyboardInterrupt
