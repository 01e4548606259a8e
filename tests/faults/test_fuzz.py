"""A few seeded inputs of each reader and of the flags; the command fuzz.py tries thousands.

What is asked of each, and how an acceptance is judged, is told in fuzz.py.
"""

import signal

import fuzz
import pytest
import spec

EACH, SEED = 8, 1


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folder of good inputs."""
    return fuzz.make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture(autouse=True)
def in_time():
    """An input that hangs becomes a TimeoutError, where the system has alarms."""

    def give_up(number, frame):
        raise TimeoutError("hangs")

    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(60)
    yield
    if hasattr(signal, "SIGALRM"):
        signal.alarm(0)


@pytest.mark.parametrize("name", fuzz.READERS | fuzz.FLAGS)
def test_hostile_inputs_are_refused_in_one_line_or_read_as_the_definition_says(
    monkeypatch, good, name
):
    pytest.importorskip(fuzz.NEEDS.get(name, "json"))
    monkeypatch.chdir(good)
    outcomes = {number: fuzz.try_input(name, number, SEED, good) for number in range(EACH + 1)}
    bad = {number: found for number, found in outcomes.items() if found[0] in fuzz.COLUMNS[3:]}
    assert not bad, f"{name}: seed {SEED}"
    assert outcomes[0][0] == "accepted"


def test_an_acceptance_is_silent_if_the_independent_reading_differs_or_refuses(capfd):
    def refuse():
        raise spec.Refuse("never")

    def shout():
        print("two\nlines", file=fuzz.sys.stderr)
        raise SystemExit(2)

    def end():
        raise KeyError("x")

    assert fuzz.judge(lambda: [1, 2.0], lambda: [1, 2.0]) == ("accepted", "")
    assert fuzz.judge(lambda: {"tied": True}, lambda: {"tied": 1})[0] == "silent"
    assert fuzz.judge(lambda: [1], refuse) == ("silent", "accepted, but: never")
    assert fuzz.judge(shout, refuse) == ("lines", "two\nlines\n")
    assert fuzz.judge(end, refuse)[0] == "traceback"
