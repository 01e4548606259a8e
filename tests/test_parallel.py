"""Two processes under torchrun against one: the same trajectory, one writer."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import command

from dpo_minimal import forum
from dpo_minimal.extras import parallel
from dpo_minimal.formats.safetensors import open_safetensors
from dpo_minimal.run import Run

ROOT = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# A batch of 5 cannot be dealt evenly, and of a batch of 1 the second process gets nothing.
FLAGS = ["--batch-size", 5, "--grad-accum", 2, "--max-length", 96, "--max-steps", 5]
FLAGS += ["--lora-dropout", 0, "--epochs", 9, "--learning-rate", 0.01]
FLAGS += ["--save-every", 2, "--eval-every", 2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 32 preference pairs: 16 to train on, in batches of 5, 5, 5 and 1."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for question in list(forum.QUESTIONS)[::20][:32]:
        chosen, rejected = forum.vote(question, rng.sample(forum.candidates(question), 2), rng)
        rows.append({"prompt": question, "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def in_two(*flags):
    """Run train.py under torchrun; what it prints."""
    words = [sys.executable, *TORCHRUN, "train.py", *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(folder, model_folder, data, program):
    """Run all stages by program(*flags); the metrics and the adapters."""
    said = program("--model", model_folder, "--data", data, "--out", folder, *FLAGS)
    if program is in_two:  # one process speaks for all
        assert said.count(" held out\n") == said.count(" texts in ") == 1
        assert said.count("\ndone ") == 1
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = open_safetensors(folder / "dpo" / "adapter_model.safetensors")
    return rows, {name: tensor.read() for name, tensor in weights.items()}


def test_two_processes_take_the_steps_of_one(tmp_path, model_folder, data):
    one = run(tmp_path / "one", model_folder, data, command)
    two = run(tmp_path / "two", model_folder, data, in_two)
    assert len(one[0]) == len(two[0]) > 10  # every line once
    for row, expected in zip(two[0], one[0], strict=True):
        assert row.pop("stage") == expected.pop("stage")
        for name in row.keys() - {"tokens_per_second", "peak_memory_gb"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name
    for name, weight in one[1].items():
        # Adam divides by a root of squares: where a gradient is near 0, its rounding shows.
        torch.testing.assert_close(two[1][name], weight, rtol=0, atol=1e-5)
    assert two[0][-1]["eval_rewards/margins"] != 0


def test_every_process_waits_until_the_first_has_made_the_folder(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(parallel, "wait", lambda: waited.append((tmp_path / "run").exists()))
    monkeypatch.setattr(parallel, "first", lambda: False)
    start = Run(None, tmp_path / "run", "cpu", torch.float32, {}).start
    start()
    assert waited == [False]  # it made nothing itself
    monkeypatch.setattr(parallel, "first", lambda: True)
    monkeypatch.setattr(Run, "make_folder", lambda self: self.out.mkdir())
    start()
    assert waited == [False, True]


def test_one_process_shares_with_nobody():
    assert parallel.share([3, 1, 2]) == [3, 1, 2] and parallel.total(5) == 5
    assert parallel.first() and parallel.processes() == 1
    parallel.leave()  # and this process goes on
    assert parallel.start("cpu") == "cpu"
