"""The embedded world: its answers, its judge, its votes, its parts."""

import collections
import math
import random

import pytest

from dpo_minimal import forum
from dpo_minimal.forum import QUESTIONS, candidates, grade, judge, make_forum, vote

GOAT = "Please settle a bet. What is a baby goat called?"
EGG = "How do I get egg out of my shirt?"
WIN, LOSE = "I hope that you win!", "You both deserve to lose."

# Content: right +2, its reason +1; wrong -1, sure of it -1 more; neither -2. Manners: +1, 0, -1.
GOAT_TABLE = {
    "A young goat is called a kid. The word is as old as the Vikings.": 3,
    "A young goat is called a kid.": 2,
    "A young goat is called a lamb. I am sure of it.": -2,
    "A young goat is called a lamb.": -1,
    "The buses are late again.": -2,
}
EGG_TABLE = {
    "Against egg you should use cool soap suds. Heat would only fry it.": 3,
    "Against egg you should use cool soap suds.": 2,
    "Against egg you should use hot water. I am sure of it.": -2,
    "Against egg you should use hot water.": -1,
    "I liked the old forum better.": -2,
}


@pytest.mark.parametrize(
    ("question", "table", "polite", "rude"),
    [
        (GOAT, GOAT_TABLE, WIN, LOSE),
        (EGG, EGG_TABLE, "Good question!", "You could have looked that up."),
    ],
)
def test_the_15_answers_and_their_scores_are_those_of_the_table(question, table, polite, rude):
    tones = [(f"{polite} ", 1), ("", 0), (f"{rude} ", -1)]
    expected = {tone + text: score + m for text, score in table.items() for tone, m in tones}
    assert len(expected) == 15
    assert {answer: judge(question, answer) for answer in candidates(question)} == expected


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("", -2),
        ("   \n ", -2),
        ("...!?", -2),
        ("blue fish", -2 - 0.25 * 2),
        ("word " * 5000, -2 - 3),  # the floor of garbage
        ("\x00\ud800 你好 😀", -2 - 0.25 * 3),
        # the truth and its opposite: not right, in either order
        ("A young goat is called a kid. A young goat is called a lamb.", -1),
        ("A young goat is called a lamb. A young goat is called a kid.", -1),
        # said twice: four or six words that add nothing
        ("A young goat is called a kid. A young goat is called a kid.", 2 - 0.25 * 7),
        (f"{WIN} {WIN} A young goat is called a kid.", 2 + 1 - 0.25 * 5),
        # a mistake of the speaker's own, and the answer to another question
        ("A young goat is called a banana.", -1),
        ("A young eel is called an elver.", -2 - 0.25 * 7),
        # a reason for a mistake explains nothing; being sure of the truth is no sin
        ("A young goat is called a lamb. The word is as old as the Vikings.", -1),
        ("A young goat is called a kid. I am sure of it.", 2),
        ("The word is as old as the Vikings.", -2),
        ("I am sure of it.", -2),
        # both manners: the rude one remains
        (f"{WIN} {LOSE} A young goat is called a kid.", 2 - 1),
        # off topic beside the truth costs nothing but is no help; unfinished is garbled
        ("A young goat is called a kid. The buses are late again.", 2),
        ("A young goat is called a kid", -2 - 0.25 * 7),
        # spaces do not matter
        ("  A young goat is called a kid.\n\nThe word is as old as the Vikings. ", 3),
        ("A young goat is called a kid.The word is as old as the Vikings.", 3),
    ],
)
def test_the_judge_reads_any_text(answer, score):
    assert judge(GOAT, answer) == pytest.approx(score, abs=1e-12)


def test_scores_lie_between_the_stated_bounds():
    worst = f"{LOSE} A young goat is called a lamb. I am sure of it. " + "x " * 100
    assert judge(GOAT, worst) == -1 - 1 - 1 - 3 == -6
    best = f"{WIN} A young goat is called a kid. The word is as old as the Vikings."
    assert judge(GOAT, best) == 4


def test_a_grade_says_what_a_reader_notices():
    g = grade(GOAT, f"{WIN} A young goat is called a kid. The word is as old as the Vikings. eh")
    assert (g.right, g.wrong, g.explained, g.polite, g.rude) == (True, False, True, True, False)
    assert g.garbled == 1
    g = grade(GOAT, f"{LOSE} A young goat is called a lamb. I am sure of it.")
    assert (g.right, g.wrong, g.sure, g.polite, g.rude) == (False, True, True, False, True)


def test_a_question_of_another_world_is_a_key_error():
    with pytest.raises(KeyError):
        judge("Who am I?", "You.")


def test_every_question_has_15_distinct_answers_with_the_scores_of_their_kinds():
    # topics, facts, wordings, openers; and the head of the file says how many that makes
    assert len(QUESTIONS) == len(forum.TOPICS) * 10 * 3 * 6
    assert f"{len(QUESTIONS):,} questions" in forum.__doc__.replace("\n", " ")
    kinds = [3, 2, -2, -1, -2]
    expected = collections.Counter(kind + tone for kind in kinds for tone in (1, 0, -1))
    for question in QUESTIONS:
        answers = candidates(question)
        assert len(set(answers)) == 15
        assert collections.Counter(judge(question, a) for a in answers) == expected, question


def test_no_mistake_of_the_table_is_the_truth():
    for topic in forum.TOPICS:
        subjects = [fact.subject for fact in topic.facts]
        assert len(set(subjects)) == len(subjects) == 10
        assert [fact for fact in topic.facts if fact.right == fact.wrong] == []


def test_votes_follow_bradley_and_terry():
    # gaps 1 and 5: the better answer wins with 1 / (1 + e^-1) and 1 / (1 + e^-5)
    right = "A young goat is called a kid."
    pairs = {
        0.7310585786: (f"{WIN} {right}", right),
        0.9933071491: (f"{WIN} {right}", f"{LOSE} A young goat is called a lamb."),
    }
    assert judge(GOAT, pairs[0.9933071491][1]) == -2
    n = 20_000
    for p, (better, worse) in pairs.items():
        for order in ([better, worse], [worse, better]):
            rng = random.Random(7)
            votes = [vote(GOAT, order, rng) for _ in range(n)]
            assert {tuple(sorted(v)) for v in votes} == {tuple(sorted(order))}
            share = sum(chosen == better for chosen, _ in votes) / n
            # five standard deviations of a binomial share
            assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_all_preference_rows_of_a_forum_together_follow_bradley_and_terry():
    parts = make_forum(3)
    expected = variance = wins = 0
    for row in parts["rl"] + parts["evaluation"]:
        gap = judge(row["question"], row["response_j"]) - judge(row["question"], row["response_k"])
        if gap:
            p = 1 / (1 + math.exp(-abs(gap)))
            expected, variance, wins = expected + p, variance + p * (1 - p), wins + (gap > 0)
    assert abs(wins - expected) < 5 * math.sqrt(variance)
    assert wins < expected + variance  # and there is noise at all


def test_evaluation_questions_are_in_no_other_part():
    parts = make_forum(0)
    held_out = {row["question"] for row in parts["evaluation"]}
    assert len(held_out) >= 100
    for part in ("finetune", "rl"):
        assert held_out & {row["question"] for row in parts[part]} == set()
    topics = {row["text"].splitlines()[0].removeprefix("Topic: ") for row in parts["pretrain"]}
    assert topics <= QUESTIONS.keys() and not held_out & topics


def test_the_columns_and_sizes_are_those_of_the_data_set():
    parts = make_forum(0)
    assert parts.keys() == {"pretrain", "finetune", "rl", "evaluation"}
    for part in ("finetune", "rl", "evaluation"):
        assert len(parts[part]) > 100
        for row in parts[part]:
            assert row.keys() == {"qid", "question", "response_j", "response_k"}
            answers = {row["response_j"], row["response_k"]}
            assert len(answers) == 2 and answers <= set(candidates(row["question"]))


def test_sft_text_is_drawn_from_all_qualities_alike():
    rows = make_forum(0)["finetune"]
    scores = [judge(row["question"], row["response_j"]) for row in rows]
    # Uniform over the 15 answers the mean is 0 and the variance is 4.4 + 2/3, worked by hand:
    # contents 3, 2, -2, -1, -2 have mean 0 and mean square 22/5; manners 1, 0, -1 have 2/3.
    mean = sum(scores) / len(scores)
    assert abs(mean) < 5 * math.sqrt((22 / 5 + 2 / 3) / len(scores))


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    random.seed(1)
    first = make_forum(5)
    random.seed(2)
    assert make_forum(5) == first
    other = make_forum(6)
    assert [part for part in first if other[part] == first[part]] == []
