"""A small question-and-answer forum with a judge who knows the truth.

Real preference data has no ground truth; this closed world has. 40 facts, asked in 18 ways each,
make 720 questions; each has 15 possible answers: right with its reason, right, wrong and sure of
it, wrong, or off topic, each said politely, plainly or rudely. `judge` gives any text its true
score, and a vote between two answers is Bradley-Terry's: P(j beats k) = sigmoid(score_j - score_k).
Rows have the columns of the data set stack-exchange-paired.
"""

import itertools
import math
import random
import re
from dataclasses import dataclass
from typing import NamedTuple


class Fact(NamedTuple):
    """One thing to know: what is asked about, the truth, a common mistake, and why it is so."""

    subject: str
    right: str
    wrong: str
    reason: str


class Topic(NamedTuple):
    """One board: three ways to ask, the sentence that answers, an off-topic remark, the facts."""

    questions: tuple[str, str, str]
    statement: str
    remark: str
    facts: list[Fact]


def facts(table: str) -> list[Fact]:
    """Read lines of subject | right | wrong | reason."""
    lines = [line.split(" | ") for line in table.strip().splitlines()]
    return [Fact(*(cell.strip() for cell in line)) for line in lines]


TOPICS = [
    Topic(
        (
            "What is a baby {} called?",
            "What do you call a young {}?",
            "Is there a proper word for a young {}?",
        ),
        "A young {} is called {}.",
        "The buses are late again.",
        facts("""
            kangaroo | a joey | a cub | It is as small as a bean when it climbs into the pouch.
            swan | a cygnet | a duckling | The word comes from the French for swan.
            goat | a kid | a lamb | The word is as old as the Vikings.
            hare | a leveret | a bunny | The word comes from the French for hare.
            fox | a cub | a foal | It is born in the dark with its eyes shut.
            eel | an elver | a tadpole | It swims up the rivers in spring.
            seal | a pup | a kitten | Its first coat is thick and soft.
            deer | a fawn | a joey | Its white spots hide it among the leaves.
            goose | a gosling | a cygnet | It simply means a small goose.
            owl | an owlet | a gosling | The ending just means that it is little.
        """),
    ),
    Topic(
        (
            "What is a group of {} called?",
            "What do you call many {} together?",
            "Is there a special word for a group of {}?",
        ),
        "A group of {} is called {}.",
        "Has anyone seen my green bicycle?",
        facts("""
            crows | a murder | a gaggle | Hunters made the name up long ago.
            owls | a parliament | a choir | A story for children made the name popular.
            lions | a pride | a pack | The females hunt together.
            geese | a gaggle | a herd | It sounds just like the noise that they make.
            giraffes | a tower | a pile | One look at the necks explains it.
            ants | a colony | a crowd | They are nearly all sisters.
            wolves | a pack | a pride | It is mostly parents and their young.
            fish | a school | a class | Swimming together confuses the hungry pike.
            flamingos | a flamboyance | a parade | It is hard to argue with all that pink.
            penguins | a waddle | a tower | Watch them walk and you will see.
        """),
    ),
    Topic(
        (
            "How do I get {} out of my shirt?",
            "What helps against {} on a tablecloth?",
            "Does anything remove {} from my trousers?",
        ),
        "Against {} you should use {}.",
        "I liked the old forum better.",
        facts("""
            red wine | salt | more wine | It draws the wine up before it dries.
            grass | vinegar | green paint | The acid loosens the green.
            candle wax | a warm iron | a candle | Put paper on it to soak up the wax.
            chewing gum | ice | a warm iron | It snaps off once it is hard.
            blood | cold water | hot water | Heat would only cook it into the cloth.
            ink | alcohol | a pencil | It dissolves the dye.
            butter | dish soap | more butter | Soap is made for grease.
            rust | lemon juice | sea water | The acid dissolves the iron.
            mud | a stiff brush | hot milk | Let it dry first and it falls right off.
            egg | cool soap suds | hot water | Heat would only fry it.
        """),
    ),
    Topic(
        (
            "What do I need to {}?",
            "Which tool would you use to {}?",
            "I have to {}, so what should I buy?",
        ),
        "To {} you need {}.",
        "It has been raining here since Tuesday.",
        facts("""
            tighten a bolt | a spanner | a hammer | A hammer will only make it angry.
            hang a shelf | a spirit level | a good mood | The little bubble never lies.
            cut a plank | a saw | a butter knife | Let the teeth do the work.
            drive in a nail | a hammer | a shoe | Hold it near the end and swing gently.
            mend a tyre | a rubber patch | chewing gum | Roughen the rubber so that it sticks.
            sharpen a chisel | a whetstone | a spoon | Keep the edge flat on it.
            find north | a compass | a fork | Its needle follows the field of the earth.
            clear a sink | a plunger | a trumpet | It pulls as well as it pushes.
            measure a room | a tape measure | a banana | Write the numbers down at once.
            sew on a button | a needle | a stapler | Leave a little stem of thread under it.
        """),
    ),
]
# What askers say first, with the polite and the rude reply to it.
OPENERS = [
    ("", "Good question!", "You could have looked that up."),
    ("My daughter wants to know.", "What a lovely thing to ask!", "She is wasting my time."),
    ("Please settle a bet.", "I hope that you win!", "You both deserve to lose."),
    ("I am new here.", "Welcome to the forum!", "Newcomers should read first."),
    ("This may be a silly question.", "No question is silly!", "It is very silly indeed."),
    ("Quick, I am in a hurry.", "Happy to help!", "Your hurry is not my problem."),
]
SURE = "I am sure of it."
POLITE = {polite for _, polite, _ in OPENERS}
RUDE = {rude for _, _, rude in OPENERS}
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
            text = f"{opener[0]} {wording.format(fact.subject)}".strip()
            questions.append(Question(text, topic, fact, *opener[1:]))
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
    content = 2 if g.right else -1 if g.wrong else -2
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
