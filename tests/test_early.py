"""`--stop-when`: DPO ends once the KL of its own answers is above the limit, and not before."""

import json
import math
from types import SimpleNamespace

import pytest
from helpers import tiny_llama
from test_loop import adapted, by_length, rows_of, run, sft_collate, sft_objective
from test_train import STEPS, command, metrics, preference_rows, refuse, write_rows

from dpo_minimal import InputError
from dpo_minimal.data import EncodedPair
from dpo_minimal.extras import early, parallel
from dpo_minimal.loop import Settings, Stage, train

EVERY = ["--eval-every", 1, "--learning-rate", 0.05, "--max-steps", 6]


def evaluations(*kls):
    """An evaluation that finds these KLs one after the other."""
    found = iter(kls)
    return lambda model: {"loss": 1.0, "kl": next(found)}


@pytest.mark.parametrize(
    ("limit", "kls", "trained"),
    [(2.0, (0, 1, 2, 2.5), 6), (None, (0, 9, 9, 9, 9), 8), (2.0, (0, math.nan), 2)],
)
def test_the_stage_ends_with_the_first_evaluation_above_the_limit(tmp_path, limit, kls, trained):
    settings = Settings(learning_rate=0.01, batch_size=3, eval_every=2, stop_when=limit)
    rows = run(tmp_path, adapted(), settings, 8, evaluate=evaluations(*kls))
    assert [row["step"] for row in rows if "loss" in row] == list(range(trained))
    assert [row["step"] for row in rows if "eval_kl" in row] == [2 * i for i in range(len(kls))]


def test_a_signal_during_the_deciding_evaluation_is_not_lost(tmp_path):
    settings = Settings(0.01, batch_size=3, epochs=4, eval_every=2, stop_when=2.0)
    asked = []

    def evaluate(model):
        asked.extend([1] * (len(seen) == 1))
        seen.append(9.0 if seen else 0.0)
        return {"loss": 1.0, "kl": seen[-1]}

    seen = []
    stage = Stage("sft", sft_objective, by_length(), sft_collate, evaluate)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 2"):
        train(adapted(), stage, settings, tmp_path, asked=asked)
    run(tmp_path, adapted(), settings, evaluate=evaluations(9.0), resume=True)
    steps = [row["step"] for row in rows_of(tmp_path) if "loss" in row]
    assert steps == [0, 1]  # it measured again, and ended there


def test_questions_that_leave_no_room_for_an_answer_are_not_asked():
    run_ = SimpleNamespace(args=SimpleNamespace(stop_when=1.0), on_forum=True, device="cpu")
    model = tiny_llama()  # its context has 128 tokens, and answers of the forum 64
    most = model.config.max_position_embeddings - 64
    pairs = [EncodedPair([1] * n, [5, 2], [6, 2]) for n in (most, most + 1, most, 3)]
    found = early.with_kl(run_, model, pairs, evaluate=None).keywords
    assert list(map(len, found["prompts"])) == [most, 3] and found["eos_id"] == 2
    with pytest.raises(InputError, match=f"all held-out questions have more than {most} tokens"):
        early.with_kl(run_, model, pairs[1:2], evaluate=None)


def test_one_of_several_processes_stops_all(monkeypatch):
    monkeypatch.setattr(parallel, "total", lambda number: number + 1)  # another one wants to
    assert early.stops({"kl": 0.5}, stop_when=2.0)
    monkeypatch.undo()
    assert not early.stops({"kl": 0.5}, stop_when=2.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder):
    """Folders of three runs that differ in --stop-when: none, out of reach, at once."""
    folder = tmp_path_factory.mktemp("early")
    data = write_rows(folder / "pairs.jsonl", preference_rows())
    flags = ["--model", model_folder, "--data", data, "--no-sft", *STEPS, *EVERY]
    with pytest.MonkeyPatch.context() as patch:  # untrained models never end an answer
        patch.setattr(early, "answer_tokens", lambda run: 8)
        command(*flags, "--stage", "dpo", "--out", folder / "none")
        command(*flags, "--stage", "dpo", "--stop-when", 1e6, "--out", folder / "far")
        command(*flags, "--stop-when", 1e-6, "--out", folder / "near")
    return folder


def dpo_rows(out):
    """The rows of DPO: (those of its steps, those of its evaluations)."""
    rows = [row for row in metrics(out) if row["stage"] == "dpo"]
    return [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]


def test_the_flag_ends_dpo_early_and_the_run_is_finished_with_what_it_has(runs):
    steps, looked = dpo_rows(runs / "near")
    assert 1 <= len(steps) < 6
    assert looked[0]["eval_kl"] == 0.0  # the policy is its reference
    assert [row["eval_kl"] > 1e-6 for row in looked] == [False] * (len(looked) - 1) + [True]
    # The adapter that was saved is the one that was measured last: merged/ has its margin.
    margin = json.loads((runs / "near" / "eval.json").read_text())["held_out"][
        "eval_rewards/margins"
    ]
    assert margin == pytest.approx(looked[-1]["eval_rewards/margins"], abs=1e-5)
    assert abs(margin - looked[-2]["eval_rewards/margins"]) > 1e-3


def test_measuring_the_kl_changes_nothing_else(runs):
    (steps, looked), (same_steps, same_looked) = dpo_rows(runs / "none"), dpo_rows(runs / "far")
    assert same_steps == steps
    assert len(looked) == 7
    for row, with_kl in zip(looked, same_looked, strict=True):
        assert math.isfinite(with_kl.pop("eval_kl"))
        assert with_kl == row


def test_without_evaluations_there_is_nothing_to_look_at(capsys, model_folder, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows())
    flags = ("--model", model_folder, "--data", data, "--out", tmp_path / "run")
    said = refuse(capsys, *flags, "--eval-every", 0, "--stop-when", 3)
    assert "--stop-when looks at the evaluations: leave out --eval-every 0" in said
