"""Runs that are killed go on as if nothing had been: the short form of kill.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_minimal.extras import reuse
from dpo_minimal.files import whole_folder, write_json

HERE = Path(__file__).parent


def test_runs_killed_three_times_and_resumed_leave_what_an_undisturbed_one_does():
    pytest.importorskip("fcntl", reason="Windows has no fork")
    # A process of its own, because a fork must come before torch has made threads.
    words = [sys.executable, HERE / "kill.py", "--kills", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills in" in done.stdout and "wrong: 0" in done.stdout


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


def test_what_reuse_copies_is_whole_wherever_a_kill_comes(tmp_path, monkeypatch):
    source, out = tmp_path / "source", tmp_path / "out"
    for name in ("base", "data", "sft"):
        (source / name).mkdir(parents=True)
        (source / name / "file").write_text(name)
    write_json(source / "config.json", {"data": "digest"})
    (source / "reference-1").write_bytes(b"values")
    out.mkdir()

    def end(path):
        raise SystemExit

    for where in ("whole_file", "whole_folder"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(reuse, where, end)
            reuse.begin(out, source, "digest")
    reuse.begin(out, source, "digest")
    copied = {p.relative_to(out) for p in out.rglob("*") if p.is_file()}
    assert copied == {p.relative_to(source) for p in source.rglob("file")} | {Path("reference-1")}
    assert (out / "reference-1").read_bytes() == b"values"
