"""The experiments under figures/: their sums against brute force, their files against each other.

Nothing is tuned or drawn here, so matplotlib is not needed. What figures/ and benchmarks/ share is
tested here too.
"""

import hashlib
import itertools
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama

# At the end, so that figures/bugs.py does not take the place of tests/bugs.py.
sys.path.append(str(Path(__file__).parents[1] / "figures"))

import closed_form
import court
import epochs
import length
import noise
import tuning as t
import world as w
from drawing import rounded, thinned, thinned_steps

from benchmarks.record import machine_record, read_log, write_result
from dpo_minimal.extras.losses import check_loss

FIGURES = Path(__file__).parents[1] / "figures"
EXPERIMENTS = sorted(path.stem for path in (FIGURES / "results").glob("*.json"))
REF = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64).log()
SCORES = torch.tensor([[1.0, -1.0, 3.0], [0.0, 2.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_figure_was_drawn_from_the_results_beside_it(name):
    digest = hashlib.sha256((FIGURES / "results" / f"{name}.json").read_bytes()).hexdigest()
    svg = (FIGURES / f"{name}.svg").read_text("utf-8")
    assert f"sha256 {digest}" in svg, f"run: python figures/{name}.py --draw"
    assert len(svg) < 150_000


def test_each_experiment_has_a_script_and_says_how_it_was_made():
    assert EXPERIMENTS
    for name in EXPERIMENTS:
        assert (FIGURES / f"{name}.py").exists()
        made = json.loads((FIGURES / "results" / f"{name}.json").read_text())["made"]
        assert {"date", "versions", "threads"} <= made.keys()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_scripts_explain_their_flags(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(FIGURES / f"{name}.py"), run_name="__main__")
    assert "--draw" in capsys.readouterr().out


def test_exact_measurements_by_hand():
    # One question, two answers; the reference has 0.4 of its probability elsewhere.
    ref, pi = (torch.tensor([p], dtype=torch.float64).log() for p in ([0.3, 0.3], [0.6, 0.2]))
    found = w.exact(pi, ref, torch.tensor([[4.0, 0.0]], dtype=torch.float64))
    assert found["score"] == pytest.approx(3.0)  # 0.75 * 4
    assert found["kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found["mass"] == pytest.approx(0.8)


def test_the_optimum_is_the_reference_tilted_by_the_reward():
    tilted = REF.exp() * (SCORES / 0.5).exp()
    expected = tilted / tilted.sum(dim=1, keepdim=True)
    assert torch.allclose(w.optimum(REF, SCORES, 0.5).exp(), expected)


def test_no_policy_on_a_grid_beats_the_frontier():
    # All policies on three answers in steps of 1/30, for the first question alone.
    ref, scores = REF[:1], SCORES[:1]
    grid = [(a, b, 30 - a - b) for a, b in itertools.product(range(31), repeat=2) if a + b <= 30]
    gaps = []
    for shares in grid[7::41]:
        logps = (torch.tensor([shares], dtype=torch.float64) / 30).clamp_min(1e-12).log()
        found = w.exact(logps, ref, scores)
        gaps.append(w.best_score(ref, scores, found["kl"]) - found["score"])
    assert min(gaps) > -1e-6
    assert min(gaps) < 0.2  # and some come near it


def test_the_share_of_the_gain_is_one_on_the_frontier_and_zero_at_the_reference_score():
    best = w.optimum(REF, SCORES, 0.7)
    found = w.exact(best, REF, SCORES)
    assert w.share_of_gain(found, REF, SCORES) == pytest.approx(1, abs=1e-6)
    start = w.exact(REF, REF, SCORES)["score"]
    half = found | {"score": (start + found["score"]) / 2}
    assert w.share_of_gain(half, REF, SCORES) == pytest.approx(0.5, abs=1e-6)
    assert w.share_of_gain(found | {"score": start}, REF, SCORES) == pytest.approx(0)


def test_best_of_n_equals_drawing_n_times():
    found = closed_form.best_of(2, REF, SCORES).exp()
    expected = torch.zeros_like(found)
    for x, (j, k) in itertools.product(range(2), itertools.product(range(3), repeat=2)):
        p = (REF[x, j] + REF[x, k]).exp()
        for y, other in ((j, k), (k, j)):  # a tie goes to the one drawn first or second
            share = 0.5 * (1 + (SCORES[x, y] - SCORES[x, other]).sign())
            expected[x, y] += p * share
    assert torch.allclose(found, expected)


def test_weights_of_votes_equal_a_count_over_all_pairs():
    chosen, rejected = w.vote_weights(SCORES)
    expected = torch.zeros(3, dtype=torch.float64)
    for j, k in itertools.permutations(range(3), 2):  # each pair of answers in both orders
        expected[j] += torch.sigmoid(SCORES[0, j] - SCORES[0, k]) / 3
    assert torch.allclose(chosen[0], expected)
    assert torch.allclose((chosen + rejected)[0], torch.full((3,), 2 / 3).double())


def test_the_optimum_of_bradley_terry_votes_is_the_tilted_reference():
    found = noise.optimum_of_votes(REF, w.win_rates(SCORES), 0.5)
    assert torch.allclose(found, w.optimum(REF, SCORES, 0.5), atol=1e-4)


def test_the_optimum_of_a_mean_has_equal_rewards_per_token():
    lengths = torch.tensor([[5.0, 9.0, 2.0], [4.0, 4.0, 8.0]], dtype=torch.float64)
    logps = length.mean_optimum(REF, SCORES, lengths, beta=6.0)
    assert torch.allclose(logps.exp().sum(dim=1), torch.ones(2).double())
    c = 6.0 * (logps - REF) / lengths - SCORES
    assert torch.allclose(c, c[:, :1].expand(2, 3), atol=1e-6)


def test_answers_log_probs_are_the_products_of_the_next_tokens_probabilities():
    model = tiny_llama()
    tokens = {"why": ([1, 2], [3, 4], [5, 6, 7])}
    world = w.World(None, ["why"], [], tokens, {})
    (found,) = w.answer_logps(model, world, ["why"]).exp()
    for answer, p in zip(tokens["why"][1:], found, strict=True):
        expected = 1.0
        for at in range(len(answer)):
            row = torch.tensor([[1, 2, *answer[:at]]])
            logits = model.lm_head(model.hidden(row))[0, -1]
            expected *= logits.softmax(dim=0)[answer[at]].item()
        assert p.item() == pytest.approx(expected, rel=1e-6)


def test_votes_are_on_known_questions_and_follow_the_scores():
    scores = {"a": torch.arange(15.0).double(), "b": torch.zeros(15).double()}
    world = w.World(None, ["a", "b"], [], {}, scores)
    votes = t.draw_votes(world, t.Recipe(votes=300))
    ordered = [winner > loser for question, winner, loser in votes if question == "a"]
    assert len(votes) == 600 and len(ordered) == 300
    assert sum(ordered) > 0.85 * 300
    turned = t.draw_votes(world, t.Recipe(votes=300, flipped=1.0))
    assert turned == [(question, loser, winner) for question, winner, loser in votes]


def test_numbers_are_rounded_to_significant_digits():
    assert rounded({"a": [123456.789, 0.000123456789], "b": 7}) == {
        "a": [123460.0, 0.00012346],
        "b": 7,
    }


def test_a_result_is_read_back_and_tells_how_it_was_made(tmp_path):
    data = {"made": machine_record(), "values": [0.1, 2], "by beta": {0.5: None}}
    write_result(tmp_path / "new" / "x.json", data)
    text = (tmp_path / "new" / "x.json").read_text("utf-8")
    assert text.count("\n") == 5  # two braces, and a line per entry
    assert json.loads(text) == data | {"by beta": {"0.5": None}}
    assert {"date", "versions", "threads", "command", "cpu"} <= data["made"].keys()


def test_a_log_is_split_by_stage_into_steps_and_evaluations(tmp_path):
    rows = [
        {"stage": "sft", "step": 0, "loss": 3.0},
        {"stage": "dpo", "step": 0, "loss": 0.7},
        {"stage": "dpo", "step": 1, "eval_loss": 0.6},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = read_log(path)
    assert log["sft"] == (rows[:1], [])
    assert log["dpo"] == (rows[1:2], [{"stage": "dpo", "step": 1, "loss": 0.6}])


@pytest.mark.parametrize("count", [14, 15, 37, 38, 60])
def test_a_thinned_curve_has_the_mean_of_each_15_whole_steps(count):
    rows = [{"loss": float(step**2)} for step in range(count)]
    groups = [range(at, at + 15) for at in range(0, count - 14, 15)]
    found = thinned(rows, "loss")
    assert found == pytest.approx([sum(step**2 for step in group) / 15 for group in groups])
    assert thinned_steps(found) == [group[7] for group in groups]


def test_the_court_hears_every_loss_in_every_condition_once():
    whole, quick = [list(court.cases(quick)) for quick in (False, True)]
    assert len(whole) == len(set(whole)) == 10 * (6 * 3 + 1)  # 6 conditions, 3 seeds; all votes
    for _, case in whole:  # one epoch of 1,000 or 3,600 votes, ten of 100
        assert case.steps * case.batch_size == max(case.count, 1000)
    everything = {case.condition() for _, case in whole if case.count > 1000}
    assert everything == {"3,600 votes, clean"}
    assert [name for name, _ in quick] == list(court.LOSSES)
    for settings in court.LOSSES.values():
        check_loss(settings)


def test_the_courts_table_has_means_over_the_seeds():
    seeds = [dict.fromkeys(court.COLUMNS, value) for value in (0.25, 0.5, 1.5)]
    found = epochs.spread(seeds)
    assert found["score"] == {"mean": 0.75, "min": 0.25, "max": 1.5}
    lines = court.format_tables({"100 votes, clean": {"DPO": found}, "made": {}}).splitlines()
    assert lines[1] == "100 votes, clean"
    number, share = "+0.75 (+0.25 to +1.50)", "75% (25% to 150%)"
    kl = number.replace("+", "")
    assert lines[5] == f"| DPO | {' | '.join([number] * 2 + [kl] * 2 + [share] * 4)} |"
