"""The experiments on doses, manners and votes: AUC, thresholds, planted votes, rankings, margins.

Nothing is tuned here but a tiny model for a few steps, and nothing is drawn.
"""

import itertools
import random
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama

# At the end, so that figures/bugs.py does not take the place of tests/bugs.py.
sys.path.append(str(Path(__file__).parents[1] / "figures"))

import dose
import epochs as e
import manners
import tuning as t
import votes
import world as w
from roc import auc, best_threshold, leave_one_out, rates

from dpo_minimal import forum

FIGURES = Path(__file__).parents[1] / "figures"

# --- bad cases against good ones --------------------------------------------------------------


def test_the_auc_by_hand():
    # Six pairs: 3 beats 1 and 2 and ties with 3; 1 ties with 1 and loses to 2 and 3.
    assert auc([3, 1], [1, 2, 3]) == pytest.approx((2.5 + 0.5) / 6)
    assert auc([5, 6], [1, 2]) == 1
    assert auc([1, 2], [5, 6]) == 0
    assert auc([], [1]) is None and auc([1], []) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_auc_equals_a_count_over_all_pairs(seed):
    rng = random.Random(seed)
    bad, good = ([rng.randrange(6) for _ in range(n)] for n in (7, 11))
    wins = [(b > g) + 0.5 * (b == g) for b, g in itertools.product(bad, good)]
    assert auc(bad, good) == pytest.approx(sum(wins) / len(wins))


def test_hits_are_shares_of_the_bad_and_false_alarms_of_the_good():
    alarms, is_bad = [True, True, False, True], [True, False, True, True]
    assert rates(alarms, is_bad) == (2 / 3, 1)


def test_the_threshold_is_halfway_and_the_highest_of_the_best():
    assert best_threshold([1, 2, 4, 8], [False, False, True, True]) == 3
    # At 1.5 and at 3.5 hits less false alarms are 1/2: the higher one raises fewer alarms.
    assert best_threshold([1, 2, 3, 4], [False, True, False, True]) == 3.5
    # Suspect values that are always low: no threshold is better than to cry always.
    assert best_threshold([1, 2], [True, False]) == 1


@pytest.mark.parametrize("seed", range(3))
def test_no_other_threshold_has_more_hits_less_false_alarms(seed):
    rng = random.Random(seed)
    values = [rng.random() for _ in range(12)]
    is_bad = [rng.random() < value for value in values[:-2]] + [True, False]

    def gain(threshold):
        hits, false = rates([value >= threshold for value in values], is_bad)
        return hits - false

    best = gain(best_threshold(values, is_bad))
    assert best == pytest.approx(max(gain(value) for value in values))


def test_each_run_is_judged_by_the_threshold_of_the_others():
    runs = [[(1, False), (5, True)], [(2, False), (3, True)], [(4, False), (9, True)]]
    # Without the first: 2 and 4 good, 3 and 9 bad: best 6.5 (or 2.5), so 5 is missed.
    # Without the second: 1 and 4 good, 5 and 9 bad: 4.5, so 3 is missed.
    # Without the third: 1 and 2 good, 3 and 5 bad: 2.5, so 9 is a hit and 4 a false alarm.
    assert leave_one_out(runs) == (1 / 3, 1 / 3)
    assert leave_one_out([[(1, False)], [(2, True)]]) is None


# --- the dose ---------------------------------------------------------------------------------


def test_a_point_is_bad_below_sft_or_far_below_the_best_so_far():
    assert dose.bad_points([0.5, 2.0, 1.6, 1.4, 2.1], 0.0) == [False, False, False, True, False]
    assert dose.bad_points([-0.1, 0.3, 1.0], 0.0) == [True, False, False]
    assert dose.bad_points([1.0, 1.0 - dose.FALL], 0.0) == [False, False]  # just not more than it


def run_of(scores, kls) -> dict:
    """A run of `dose` as its result has it: a signal that follows kls, the others are constant."""
    metrics = {metric for metric, _ in dose.SIGNALS.values()}
    course = [
        dict.fromkeys(metrics, 0.25) | {"sampled_true_score": score, "sampled_kl": kl}
        for score, kl in zip(scores, kls, strict=True)
    ]
    return {"learning_rate": 0.01, "beta": 1.0, "epochs": len(scores), "course": course}


def test_the_early_warning_counts_the_points_and_turns_signals_the_suspect_way():
    runs = [run_of([1.0, -1.0], [1, 7]), run_of([1.0, -2.0], [2, 8]), run_of([1.0], [3])]
    for run in runs:
        for point in run["course"]:
            point["chosen_logp"] = -point["sampled_kl"]
    found = dose.early_warning({"sampled_true_score": 0.0}, runs)
    assert (found["points"], found["bad"]) == (5, 2)
    for title in ("KL of its own answers", "log-prob. of chosen, per token"):
        assert found["signals"][title] == {
            "auc": 1,
            "threshold": 5,
            "hits": 1,
            "false_alarms": 0,
            "new_hits": 1,
            "new_false": 0,
            "sign": 1 if "KL" in title else -1,
        }
    assert found["signals"]["endless answers"]["auc"] == 0.5


def test_where_no_point_is_bad_a_signal_is_worth_nothing_known():
    found = dose.early_warning({"sampled_true_score": 0.0}, [run_of([1.0, 1.1], [1, 2])])
    assert set(found["signals"]["endless answers"].values()) == {None, 1}


def test_the_tables_of_the_dose():
    stopped = run_of([1.0, -2.0], [1, 2]) | {"beta": 0.1}
    stopped["course"].pop()  # its second epoch never ended
    runs = [run_of([0.5, 0.25], [1, 2]), stopped]
    sft = {"sampled_true_score": -0.25}
    lines = dose.show({"sft": sft, "runs": runs} | dose.early_warning(sft, runs)).splitlines()
    assert lines[0] == "SFT says -0.25"
    assert lines[2:4] == ["| after epoch 1 | 0.01 |", "|---|---|"]
    assert lines[4:6] == ["| beta 0.1 | +1.00 |", "| beta 1 | +0.50 |"]
    assert "| beta 0.1 | – |" in lines and "| beta 1 | +0.25 |" in lines


def test_the_number_of_policies():
    sft, *whole = dose.cases(quick=False)
    assert sft.epochs == 0 and {case.epochs for case in whole} == {3}
    grid = {(case.learning_rate, case.beta) for case in whole}
    assert grid == set(itertools.product((5e-4, 1.5e-3, 3e-3, 6e-3), (0.1, 0.3, 1.0)))
    assert len(whole) == 12 and len(dose.cases(quick=True)) == 5
    assert len(manners.cases(quick=False)) == 3 and len(manners.cases(quick=True)) == 1


# --- manners ----------------------------------------------------------------------------------


def forum_world(known=600) -> w.World:
    """The forum's questions and scores, without a tokenizer."""
    questions = list(forum.QUESTIONS)
    random.Random(0).shuffle(questions)
    scores = {
        q: torch.tensor([forum.judge(q, a) for a in forum.candidates(q)], dtype=torch.float64)
        for q in questions
    }
    return w.World(None, questions[:known], questions[600:], {}, scores)


@pytest.fixture(scope="module")
def the_forum():
    return forum_world()


@pytest.mark.parametrize("seed", manners.SEEDS)
def test_votes_are_about_26_facts_and_both_groups_are_asked(the_forum, seed):
    cast = manners.draw_votes(the_forum, manners.Case(seed))
    about = {forum.QUESTIONS[question].fact for question, *_ in cast}
    groups = manners.split(the_forum.held_out, manners.voted_facts(seed))
    asked = {
        group: {forum.QUESTIONS[q].fact for q in questions} for group, questions in groups.items()
    }
    assert len(cast) == 1600 and len(about) == 26
    assert asked["voted"] <= about and not asked["unvoted"] & about
    assert sum(map(len, groups.values())) == 120 and min(map(len, groups.values())) > 20
    assert not {question for question, *_ in cast} & set(the_forum.held_out)


def test_traits_of_the_15_answers_in_their_order(the_forum):
    tables = [manners.trait_table(the_forum.known[:3], trait) for trait in manners.TRAITS]
    right, polite, explained = (table.tolist() for table in tables)
    assert right == [[1.0] * 6 + [0.0] * 9] * 3  # contents change after three tones
    assert polite == [[1.0, 0.0, 0.0] * 5] * 3
    assert explained == [[1.0] * 3 + [0.0] * 12] * 3


def test_the_gains_are_means_over_the_seeds():
    def seed(before, after):
        return {
            "before": {group: dict.fromkeys(manners.COLUMNS, before) for group in manners.GROUPS},
            "after": {group: dict.fromkeys(manners.COLUMNS, after) for group in manners.GROUPS},
        }

    data = {"seeds": [seed(0.25, 0.5), seed(0.25, 1.0)]}
    assert manners.gains(data)["right"] == {"voted": 0.5, "unvoted": 0.5}
    lines = manners.show(data).splitlines()
    assert lines[2].startswith("| facts with votes, SFT | 25% (25% to 25%) |")
    assert lines[-1].startswith("| facts without votes, DPO − SFT | +50% |")


# --- votes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", votes.SEEDS)
def test_planted_votes_are_as_many_and_as_wrong_as_said(the_forum, seed):
    drawn = t.draw_votes(the_forum, t.Recipe(seed=seed))[:1600]
    planted = votes.planted_votes(the_forum, seed, 1600)
    kinds = [kind for kind, *_ in planted]
    assert [kinds.count(kind) for kind in votes.SHARES] == [240, 80, 80, 160]
    assert kinds.count("honest") + kinds.count("upset") == 1040
    honest = {tuple(vote) for kind, *vote in planted if kind in votes.HONEST}
    for before, (kind, question, winner, loser) in zip(drawn, planted, strict=True):
        scores = the_forum.scores[question]
        answers = forum.candidates(question)
        if kind in votes.HONEST:
            assert before == (question, winner, loser)
            assert (scores[winner] < scores[loser]) == (kind == "upset")
        elif kind == "flipped":
            assert before == (question, loser, winner)
        elif kind == "copy":
            assert (question, winner, loser) in honest
        elif kind == "turned copy":
            assert (question, loser, winner) in honest
        else:
            assert before[0] == question and {winner, loser} == set(before[1:])
            assert len(answers[winner].split()) >= len(answers[loser].split())


def test_rankings_of_a_hand_made_table():
    margins = [[3.0, -1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 5.0, -4.0]]  # three epochs, three votes
    found = votes.suspicions(margins)
    assert found == {
        "mean margin": [-1.0, -2.0, 1.0],
        "last margin": [0.0, -5.0, 4.0],
        "first epoch": [-3.0, 1.0, 0.0],
    }
    worst = [votes.worst(found[ranking], 1 / 3) for ranking in votes.RANKINGS]
    assert worst == [{2}, {2}, {1}]
    assert votes.worst([1.0, 2.0, 2.0, 0.0], 0.5) == {1, 2}


def test_each_kind_is_told_from_honest_votes_with_upsets_and_without():
    kinds = ["honest", "honest", "upset", "flipped", "length", "copy"]
    planted = [(kind, "q", 0, 1) for kind in kinds]
    found = votes.kind_aucs(planted, [1.0, 2.0, 5.0, 4.0, 1.5, 0.0])
    assert found["flipped"] == {"no_upsets": 1, "all_honest": pytest.approx(2 / 3)}
    assert found["length"] == {"no_upsets": 0.5, "all_honest": pytest.approx(1 / 3)}
    assert found["upset"] == {"no_upsets": 1}
    assert found["all planted"]["no_upsets"] == pytest.approx((2 + 1 + 0) / 6)
    assert found["turned copy"] == {"no_upsets": None, "all_honest": None}


def test_what_a_kind_was_and_what_was_dropped():
    world = w.World(None, [], [], {}, {"q": torch.tensor([0.0, 1.0])})
    planted = [("honest", "q", 1, 0), ("flipped", "q", 0, 1), ("flipped", "q", 1, 0)]
    assert votes.describe(world, planted, {1}) == {
        "honest": {"votes": 1, "wrong": 0, "dropped": 0},
        "flipped": {"votes": 2, "wrong": 0.5, "dropped": 0.5},
    }


def test_each_policy_gets_the_votes_that_were_kept_for_it(monkeypatch):
    kinds = ["honest"] * 11 + ["upset"] * 2 + ["flipped"] * 7
    planted = [(kind, f"q{i}", 0, 1) for i, kind in enumerate(kinds)]
    margins = [[float(i)] * 20 for i in range(2)]
    margins = [[row[i] + (i * 7) % 20 for i in range(20)] for row in margins]  # lowest: 0, 3, 6
    monkeypatch.setattr(e, "kept", lambda name, case, work: {"margins": margins, "of": case.kept})

    def places(kept):
        found = votes.kept_votes(planted, votes.Case(0, kept, votes=20))
        return [int(question[1:]) for question, *_ in found]

    assert places("all") == list(range(20))
    assert places("honest") == list(range(13))
    assert places("judged") == [i for i in range(20) if i not in (0, 3, 6)]
    assert len(places("lot")) == 17 and places("lot") == sorted(places("lot"))
    assert votes.kept_votes(planted, votes.Case(0, "all"))[0] == ("q0", 0, 1)


# --- training and keeping ---------------------------------------------------------------------

WORLD = w.World(
    None,
    ["why", "how"],
    [],
    {"why": ([1, 2], [3, 4, 2], [5, 6, 7, 2]), "how": ([4], [8, 2], [9, 9, 2])},
    {question: torch.zeros(2) for question in ("why", "how")},
)
CAST = [("why", 0, 1), ("how", 1, 0), ("why", 1, 0), ("how", 0, 1)]


def table_of(model) -> dict:
    """What `reference_table` would be if this model were the reference."""
    return dict(zip(WORLD.known, w.answer_logps(model, WORLD, WORLD.known), strict=True))


def test_margins_are_beta_times_what_the_policy_moved_apart(monkeypatch):
    model, ref = tiny_llama(), tiny_llama(seed=1)
    tables = [table_of(model), table_of(ref)]
    monkeypatch.setattr(t, "reference_table", lambda world: tables[1])
    found = e.vote_margins(model, WORLD, CAST, beta=0.5)
    for margin, (question, winner, loser) in zip(found.tolist(), CAST, strict=True):
        up, down = (tables[0][question][y] - tables[1][question][y] for y in (winner, loser))
        assert margin == pytest.approx(0.5 * float(up - down), abs=1e-5)


def test_a_policy_is_looked_at_after_each_epoch_and_at_its_end(monkeypatch, tmp_path):
    ref = table_of(tiny_llama())
    monkeypatch.setattr(t, "reference_table", lambda world: ref)
    monkeypatch.setattr(t, "start_policy", lambda recipe: tiny_llama())
    seen = []

    def look(model):
        seen.append(float(e.vote_margins(model, WORLD, CAST[:2], beta=1.0).mean()))
        return {"margin": seen[-1]}

    recipe = t.Recipe(batch_size=2, learning_rate=1e-3)
    model = e.train_policy(WORLD, CAST[:2], recipe, tmp_path, steps=6, look=look, every=2)
    assert len(seen) == 3 and 0 < seen[0] < seen[1] < seen[2]  # votes that agree are learned
    last = float(e.vote_margins(model, WORLD, CAST[:2], beta=1.0).mean())
    assert last == pytest.approx(seen[-1])


@dataclass(frozen=True)
class OneCase:
    number: float


def test_a_result_is_kept_by_what_its_case_is(monkeypatch, tmp_path):
    monkeypatch.setattr(w, "RUN", tmp_path)
    asked = []

    def work(case, folder):
        asked.append(case.number)
        assert folder.is_dir()
        return {"twice": 2 * case.number}

    found = [e.kept("x", OneCase(number), work)["twice"] for number in (1.5, 2.5, 1.5)]
    assert found == [3.0, 5.0, 3.0] and asked == [1.5, 2.5]


@pytest.mark.parametrize("name", ["dose", "manners", "votes"])
def test_the_scripts_explain_their_flags(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(FIGURES / f"{name}.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert "--draw" in text and "--quick" in text
