"""Run the tests that should notice bugs of the zoo, each with its bug planted in a process apart.

    python tests/plant.py FOLDER NUMBER...     number 0 is no bug, and the tests of all of them

Leaves FOLDER/NUMBER.json: pytest's exit status, what each test raised (null: it passed), seconds;
and FOLDER/NUMBER.txt: what pytest printed.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
AT_ONCE = 2  # processes


class Recorder:
    """A pytest plugin: what each test raised, by name. Errors of fixtures say where they were."""

    def __init__(self):
        self.raised = {}

    def pytest_runtest_makereport(self, item, call):
        kind = call.excinfo.typename if call.excinfo else None
        if call.when == "call":
            self.raised[item.nodeid] = kind
        elif kind:
            self.raised[item.nodeid] = f"{kind} in {call.when}"


def run_tests(folder: Path, number: int):
    """Plant bug `number` in this process and run its tests."""
    import pytest
    from bugs import ZOO, apply

    chosen = [bug for bug in ZOO if number in (0, bug.number)]
    if number:
        apply(*chosen)  # before pytest imports the tests: they take what they find
    tests = dict.fromkeys(test for bug in chosen for test in bug.tests)
    recorder, started = Recorder(), time.perf_counter()
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", folder / f"tmp-{number}"]
    # Without these two a process takes half a second longer, and nobody reads what they find.
    options += ["--assert=plain", "-p", "no:unraisableexception"]
    status = pytest.main([*map(str, options), *tests], plugins=[recorder])
    seconds = time.perf_counter() - started
    report = {"status": int(status), "raised": recorder.raised, "seconds": seconds}
    (folder / f"{number}.json").write_text(json.dumps(report))


def run_child(folder: Path, number: int):
    """`run_tests` in a forked process: what it prints goes to a file, and it never returns."""
    try:
        out = os.open(folder / f"{number}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        run_tests(folder, number)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def fork_each(folder: Path, numbers):
    """One process a bug, some at once. Forked, so that torch is imported once and not 33 times."""
    import bugs  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from torch.utils.checkpoint import checkpoint

    torch.set_num_threads(1)  # threads do not survive a fork
    checkpoint(
        torch.sin, torch.zeros(1), use_reentrant=False
    )  # its first call imports for a second
    running = 0
    for number in numbers:
        if running == AT_ONCE:
            os.wait()
            running -= 1
        if os.fork() == 0:
            run_child(folder, number)
        running += 1
    for _ in range(running):
        os.wait()


def main():
    """All processes, one after the other where there is no fork (Windows)."""
    folder, numbers = Path(sys.argv[1]), [int(number) for number in sys.argv[2:]]
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    if len(numbers) == 1:
        run_tests(folder, numbers[0])
    elif hasattr(os, "fork"):
        fork_each(folder, numbers)
    else:
        for number in numbers:
            with open(folder / f"{number}.txt", "wb") as out:
                command = [sys.executable, __file__, str(folder), str(number)]
                subprocess.run(command, stdout=out, stderr=out, check=False)


if __name__ == "__main__":
    main()
