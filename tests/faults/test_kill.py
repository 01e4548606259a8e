"""Runs that are killed go on as if nothing had been: the short form of kill.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_minimal.files import whole_folder

HERE = Path(__file__).parent


def test_runs_killed_five_times_and_resumed_leave_what_an_undisturbed_one_does():
    pytest.importorskip("fcntl", reason="Windows has no fork")
    # A process of its own, because a fork must come before torch has made threads.
    words = [sys.executable, HERE / "kill.py", "--kills", "5"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills in" in done.stdout and "wrong: 0" in done.stdout


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder"
    for text in ("old", "new"):
        with whole_folder(path) as folder:
            assert (path / "file").exists() == (text == "new")
            (folder / "file").write_text(text)
    with pytest.raises(ZeroDivisionError), whole_folder(path) as folder:
        (folder / "file").write_text("half")
        raise ZeroDivisionError
    assert (path / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
