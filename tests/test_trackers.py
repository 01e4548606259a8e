"""Trackers hold what metrics.jsonl holds, change nothing, and may fail without harm.

What W&B, TensorBoard and Trackio wrote, without a network, is read with their own packages.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_train import STEPS, assert_same_run, command, preference_rows, write_rows

from dpo_minimal import InputError, loop
from dpo_minimal.extras import trackers

ROOT = Path(__file__).parents[1]
ONLY_HERE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
FOLDERS = ["WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR"]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No tracker reaches the network, or a folder outside of this test's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in FOLDERS:
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        for name, value in ONLY_HERE.items():
            patch.setenv(name, value)
        patch.delenv("TRACKIO_SPACE_ID", raising=False)
        yield
    trackers.close()


@pytest.fixture(scope="module")
def flags(tmp_path_factory, model_folder):
    """A small run with evaluations."""
    data = write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", preference_rows())
    return ["--model", model_folder, "--data", data, *STEPS, "--eval-every", 2, "--lora-r", 2]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, flags):
    """The folder of that run without a tracker."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    command(*flags, "--out", out)
    return out


def rows_of(out):
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def expected_points(out, dtype=float):
    """{name: [(step, value)]} that a tracker should hold, from metrics.jsonl and eval.json."""
    points = {}
    for row in rows_of(out):
        prefix = {"sft": "sft/", "dpo": ""}[row.pop("stage")]
        step = row.pop("step")
        for name, value in row.items():
            points.setdefault(prefix + name, []).append((step, dtype(value)))
    for model, values in json.loads((out / "eval.json").read_text())["table"].items():
        for name, value in values.items():
            points[f"evaluate/{model}/{name}"] = [(0, dtype(value))]
    return points


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format behind 7 bytes, in blocks of 32 KiB.

    Each part of a record has a checksum (4 bytes), its length (2), its kind (1: whole, 4: last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no room for another part in this block
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def read_wandb(out):
    """({name: [(step, value)]}, settings, samples) of the W&B run in a run's folder."""
    (path,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    points, step_names, settings = {}, {}, {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "run":
            settings = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.WhichOneof("record_type") == "metric":
            step_names[record.metric.name] = record.metric.step_metric
        items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        for name in items.keys() & step_names.keys() - set(step_names.values()):
            step = json.loads(items[step_names[name]])
            points.setdefault(name, []).append((step, json.loads(items[name])))
    (table,) = path.parent.glob("files/media/table/samples*.json")
    samples = json.loads(table.read_text())
    return points, settings, [samples["columns"], *samples["data"]]


def read_tensorboard(out):
    """The same of TensorBoard's event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    texts = {}
    for name in ("settings", "samples"):
        (event,) = events.Tensors(f"{name}/text_summary")
        texts[name] = event.tensor_proto.string_val[0].decode()
    lines = texts["samples"].split("\n")  # an untrained model says other ends of lines, too
    samples = [line.strip("| ").split(" | ") for line in (lines[0], *lines[2:])]
    return points, json.loads(texts["settings"].strip("`")), samples


def read_trackio(out):
    """The same of Trackio's database."""
    from trackio.sqlite_storage import SQLiteStorage

    points, samples = {}, []
    for row in SQLiteStorage.get_logs("dpo_minimal", out.name):
        step = row.pop("step")
        del row["timestamp"]
        if "samples" in row:
            table = row.pop("samples")["_value"]
            samples = [list(table[0]), *(list(line.values()) for line in table)]
        for name, value in row.items():
            points.setdefault(name, []).append((step, value))
    return points, SQLiteStorage.get_run_config("dpo_minimal", out.name), samples


READERS = {"wandb": read_wandb, "tensorboard": read_tensorboard, "trackio": read_trackio}


def check_samples(samples, out):
    """The first row names the models, and the texts are those of samples.md."""
    lines = (out / "samples.md").read_text().split("\n")
    questions = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
    assert samples[0] == ["question", "base", "SFT", "DPO"]
    assert [question for question, *_ in samples[1:]] == questions


@pytest.mark.parametrize("kind", READERS)
def test_a_tracker_holds_the_numbers_of_metrics_jsonl_and_changes_nothing(
    tmp_path, flags, plain_run, kind
):
    pytest.importorskip(kind, reason=f"pip install {kind}")
    out = tmp_path / f"tracked-{kind}"
    command(*flags, "--track", kind, "--out", out)
    trackers.close()
    assert_same_run(out, plain_run)
    points, settings, samples = READERS[kind](out)
    dtype = np.float32 if kind == "tensorboard" else float
    expected = expected_points(out, dtype)
    assert points == expected
    assert {"loss", "rewards/chosen", "eval_rewards/margins", "sft/loss"} <= points.keys()
    assert settings["arguments"]["lora_r"] == 2 and settings["stages"]["dpo"]["batch_size"] == 4
    check_samples(samples, out)


def test_after_resume_the_tracker_holds_each_step_once(tmp_path, flags, plain_run, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    out, write = tmp_path / "run", loop.Log.write
    tracked = ["--save-every", 1, "--track", "tensorboard", "--out", out]

    def die(log, step, prefix="", **values):
        write(log, step, prefix, **values)
        if log.stage == "dpo" and step == 1:
            raise KeyboardInterrupt  # the row of step 1 is written, and will be once more

    monkeypatch.setattr(loop.Log, "write", die)
    with pytest.raises(KeyboardInterrupt):
        command(*flags, *tracked)
    monkeypatch.setattr(loop.Log, "write", write)
    command(*flags, *tracked, "--resume")
    trackers.close()
    assert_same_run(out, plain_run)
    assert read_tensorboard(out)[0] == expected_points(out, np.float32)


# What goes wrong.


class Broken:
    """A tracker that fails at its third row."""

    def __init__(self, folder, config):
        self.rows = 0

    def write(self, metrics, prefix, step):
        self.rows += 1
        if self.rows == 3:
            raise RuntimeError("no network\nand more of it")

    write_samples = close = write


def test_a_tracker_that_fails_ends_with_a_warning_and_the_run_goes_on(
    tmp_path, flags, plain_run, monkeypatch, capsys
):
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Broken)
    monkeypatch.setattr(trackers, "check_installed", lambda kind: None)
    command(*flags, "--track", "trackio", "--out", tmp_path / "run")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "--track" in line]
    warning = "warning   --track trackio failed, and the run goes on without it (no network)"
    assert warnings == [warning] and not trackers.active
    assert_same_run(tmp_path / "run", plain_run)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_full_disk_is_noticed_at_the_row_that_does_not_fit(tmp_path, plain_run, capsys):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    trackers.start("tensorboard", tmp_path, {})
    with open("/dev/full", "wb", buffering=0) as full:
        trackers.active["tracker"].writer = RecordWriter(full)
        trackers.follow(plain_run / "metrics.jsonl")
    assert "No space left on device" in capsys.readouterr().out and not trackers.active


@pytest.mark.parametrize("kind", READERS)
def test_without_the_package_one_line_and_no_folder(tmp_path, flags, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(InputError, match=f"--track {kind} needs a package: pip install {kind}"):
        command(*flags, "--track", kind, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_a_tracker_left_here_is_not_taken_for_its_package(tmp_path, monkeypatch):
    (tmp_path / "left_by_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="pip install left_by_a_tracker"):
        trackers.check_installed("left_by_a_tracker")
    trackers.check_installed("numpy")
    trackers.check_installed(None)


def test_a_tracker_that_does_not_begin_is_one_line(tmp_path, flags, monkeypatch):
    def no_login(folder, config):
        raise RuntimeError("api_key not configured\nsee the manual")

    monkeypatch.setitem(trackers.TRACKERS, "trackio", no_login)
    monkeypatch.setattr(trackers, "check_installed", lambda kind: None)
    with pytest.raises(InputError, match="--track trackio: api_key not configured; put it right"):
        command(*flags, "--track", "trackio", "--out", tmp_path / "run")


def test_resume_does_not_ask_for_the_tracker_of_the_earlier_command(tmp_path, flags, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Broken)
    monkeypatch.setattr(trackers, "check_installed", lambda kind: None)
    out = tmp_path / "run"
    command(*flags, "--track", "trackio", "--stage", "sft", "--out", out)
    command("--stage", "dpo", "--out", out)
    assert json.loads((out / "config.json").read_text())["arguments"]["track"] is None
    assert not trackers.active


def test_no_optional_package_is_imported_unless_asked_for():
    names = "{'wandb', 'tensorboard', 'trackio', 'matplotlib'}"
    code = f"import sys, train; print({names} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
