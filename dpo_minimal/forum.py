"""A small question-and-answer forum with a judge who knows the truth.

Real preference data has no ground truth; this closed world has one. Its 40 facts, in forum.json,
can each be asked in 18 ways: 720 questions. Each has 15 possible answers: right with its reason,
right, wrong and sure of it, wrong, or off topic, and each said politely, plainly or rudely.
`judge` gives any text its true score. A vote between two answers follows Bradley and Terry:
P(j beats k) = sigmoid(score_j - score_k). Rows have the columns of stack-exchange-paired.
"""

import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dpo_minimal.files import whole_folder


class Fact(NamedTuple):
    """One thing to know: what is asked about, the truth, a common mistake, and why it is so."""

    subject: str
    right: str
    wrong: str
    reason: str


class Topic(NamedTuple):
    """One board: three ways to ask, the sentence that answers, an off-topic remark, the facts."""

    questions: list[str]
    statement: str
    remark: str
    facts: list[Fact]


class Opener(NamedTuple):
    """What an asker says first, with the polite and the rude reply to it."""

    text: str
    polite: str
    rude: str


def read_world() -> tuple[list[Topic], list[Opener]]:
    """The topics and openers of forum.json."""
    world = json.loads(Path(__file__).with_name("forum.json").read_text("utf-8"))
    topics = []
    for topic in world["topics"]:
        facts = [Fact(**fact) for fact in topic.pop("facts")]
        topics.append(Topic(**topic, facts=facts))
    return topics, [Opener(**opener) for opener in world["openers"]]


TOPICS, OPENERS = read_world()
SURE = "I am sure of it."
POLITE = {opener.polite for opener in OPENERS}
RUDE = {opener.rude for opener in OPENERS}
REMARKS = {topic.remark for topic in TOPICS}


@dataclass(frozen=True)
class Question:
    """A question of the world, what it is about, and how a polite or a rude reply begins."""

    text: str
    topic: Topic
    fact: Fact
    polite: str
    rude: str


def all_questions() -> list[Question]:
    """Every question that can be asked, 720 of them, in a fixed order."""
    questions = []
    for topic in TOPICS:
        for fact, wording, opener in itertools.product(topic.facts, topic.questions, OPENERS):
            text = f"{opener.text} {wording.format(fact.subject)}".strip()
            questions.append(Question(text, topic, fact, opener.polite, opener.rude))
    return questions


QUESTIONS = {question.text: question for question in all_questions()}


def candidates(question: str) -> list[str]:
    """The 15 answers that people give to a question of the world."""
    q = QUESTIONS[question]
    right = q.topic.statement.format(q.fact.subject, q.fact.right)
    wrong = q.topic.statement.format(q.fact.subject, q.fact.wrong)
    contents = [f"{right} {q.fact.reason}", right, f"{wrong} {SURE}", wrong, q.topic.remark]
    tones = [f"{q.polite} ", "", f"{q.rude} "]
    return [tone + content for content, tone in itertools.product(contents, tones)]


class Grade(NamedTuple):
    """What a reader of an answer notices; `garbled` counts the words that make no sense here."""

    right: bool
    wrong: bool
    explained: bool
    sure: bool
    polite: bool
    rude: bool
    garbled: int


def grade(question: str, answer: str) -> Grade:
    """Read an answer sentence by sentence. Any text will do; KeyError for an unknown question."""
    q = QUESTIONS[question]
    before, after = q.topic.statement.format(q.fact.subject, "|").split("|")
    right = f"{before}{q.fact.right}{after}"
    known = {right, q.fact.reason, SURE, q.topic.remark} | POLITE | RUDE | REMARKS
    seen, stated, garbled = set(), False, 0
    for sentence in re.findall(r"[^.!?\s][^.!?]*[.!?]*", answer):
        sentence = sentence.strip()
        claim = sentence.startswith(before) and sentence.endswith(after) and sentence != right
        stated = stated or claim  # a claim about the subject that is not the truth
        if (sentence not in known and not claim) or sentence in seen:
            garbled += len(sentence.split())
        seen.add(sentence)
    return Grade(
        right=right in seen and not stated,
        wrong=stated,
        explained=right in seen and not stated and q.fact.reason in seen,
        sure=stated and SURE in seen,
        polite=bool(seen & POLITE) and not seen & RUDE,
        rude=bool(seen & RUDE),
        garbled=garbled,
    )


def judge(question: str, answer: str) -> float:
    """The true score of any answer to a question of the world, from -6 (worst) to 4 (best).

    Right +2, wrong -1, neither -2; the reason +1, being sure of a mistake -1; polite +1, rude -1;
    -0.25 for each word that makes no sense here, or says a thing twice, down to -3.
    """
    g = grade(question, answer)
    content = -2
    if g.right:
        content = 2
    elif g.wrong:
        content = -1
    manners = g.polite - g.rude
    return content + g.explained - g.sure + manners - min(3.0, 0.25 * g.garbled)


def vote(question: str, answers: list[str], rng: random.Random) -> tuple[str, str]:
    """One noisy vote between two answers, as (chosen, rejected): Bradley & Terry 1952."""
    j, k = answers
    p = 1 / (1 + math.exp(judge(question, k) - judge(question, j)))
    return (j, k) if rng.random() < p else (k, j)


def make_forum(seed: int) -> dict[str, list[dict]]:
    """The parts of the data set, each a list of rows, the same for the same seed.

    `pretrain` (text: a thread), `finetune` (response_j is anyone's answer), `rl` (votes), and
    `evaluation` (votes on questions that no other part contains).
    """
    rng = random.Random(seed)
    questions = list(QUESTIONS)
    rng.shuffle(questions)
    held_out, known = questions[:120], questions[120:]

    def rows(questions, each, ordered):
        order = [question for question in questions for _ in range(each)]
        rng.shuffle(order)
        for qid, question in enumerate(order):
            pair = rng.sample(candidates(question), 2)
            j, k = vote(question, pair, rng) if ordered else pair
            yield {"qid": qid, "question": question, "response_j": j, "response_k": k}

    threads = []
    for question in known * 12:
        replies = rng.sample(candidates(question), 3)
        lines = [f"Topic: {question}", *(f"Reply: {reply}" for reply in replies)]
        threads.append({"text": "\n".join(lines)})
    rng.shuffle(threads)
    return {
        "pretrain": threads,
        "finetune": list(rows(known, 3, ordered=False)),
        "rl": list(rows(known, 6, ordered=True)),
        "evaluation": list(rows(held_out, 2, ordered=True)),
    }


def write_forum(path, seed: int):
    """Write the parts of `make_forum` as files: path/pretrain/forum.jsonl and so on."""
    with whole_folder(path) as folder:
        for part, rows in make_forum(seed).items():
            (folder / part).mkdir()
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / part / "forum.jsonl").write_text(lines, "utf-8")
