"""Every bug of the zoo is noticed by a test that does not know about it.

`pytest tests/test_bugs.py -s` prints the zoo: bug, symptom, killing test, seconds.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bugs import ZOO

PLANT = Path(__file__).with_name("plant.py")
# What a wrong value raises: assert, numpy's and torch's comparisons; Failed is pytest.raises's.
WRONG_VALUE = ("AssertionError", "Failed")


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """A function from a bug's number to its report and what pytest printed, of one run for all."""
    folder = tmp_path_factory.mktemp("bugs")
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    bugs = [spec.params["bug"].number for spec in asked if spec and "bug" in spec.params]
    command = [sys.executable, PLANT, folder, *map(str, [0, *bugs])]
    subprocess.run(command, check=True, timeout=600)

    def read(number):
        file, text = folder / f"{number}.json", (folder / f"{number}.txt").read_text("utf-8")
        assert file.exists(), f"pytest did not come to its end:\n{text}"
        return json.loads(file.read_text()), text

    return read


@pytest.fixture(scope="module")
def table():
    """Collects the lines of the zoo and prints them at the end."""
    lines = []
    yield lines
    print("\n\n" + "\n".join(lines))


def cases(report, test):
    """What a test raised, for each of its parameters; a name without parameters means all."""
    raised = report["raised"].items()
    return [kind for name, kind in raised if name == test or name.startswith(f"{test}[")]


def test_the_zoo_has_32_bugs_in_order():
    assert [bug.number for bug in ZOO] == list(range(1, 33))
    assert len({bug.name for bug in ZOO}) == 32
    assert all(bug.symptom and bug.tests and bug.wrong is not bug.right for bug in ZOO)


def test_without_a_bug_all_the_killing_tests_pass(reports):
    report, text = reports(0)
    assert report["status"] == 0 and not any(report["raised"].values()), text
    assert all(cases(report, test) for bug in ZOO for test in bug.tests)


@pytest.mark.parametrize("bug", ZOO, ids=[f"{bug.number}: {bug.name}" for bug in ZOO])
def test_a_planted_bug_is_noticed(reports, table, bug):
    report, text = reports(bug.number)
    assert report["status"] == 1, text  # tests ran and failed: 2 and more are errors of their own
    for test in bug.tests:
        assert set(cases(report, test)) & set(WRONG_VALUE), f"{test} does not notice:\n{text}"
    table.append(f"{bug.number:2} {bug.name}\n     {bug.symptom}")
    table.extend(f"     {test}" for test in bug.tests)
    table[-1] += f"  ({report['seconds']:.1f} s)"
