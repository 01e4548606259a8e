"""What generalizes: manners, or knowing what is right? Votes about 26 of the 40 facts only.

    python figures/manners.py [--draw]   three policies of 100 steps, 3 minutes of two cores
    python figures/manners.py --quick    one policy of a few steps, to see that all of it works

DPO on 1,600 clean votes about 26 facts, drawn by the seed, one epoch of 100 steps of 16 votes. The
policy is then asked about these facts and about the 14 others, each time in wordings that are in no
training text. So the two groups differ in one thing: whether anyone voted on the fact.

Pretraining and SFT texts hold right and wrong answers to all 40 facts, equally often. So nothing
but votes says which is right; only a reason, which right answers alone have, hints at it. A polite
reply is known by its words, whatever the fact.
"""

import random
from dataclasses import asdict, dataclass, replace

import epochs as e
import torch
import tuning as t
import world as w
from drawing import BLUE, GREY, main

from dpo_minimal import forum

FACTS = 26  # that are voted on
SEEDS = (0, 1, 2)
GROUPS = {"voted": "facts with votes", "unvoted": "facts without votes"}
TRAITS = ("right", "polite", "explained")
COLUMNS = {
    "right": ("right", "{:.0%}"),
    "sampled_share_right": ("as it speaks", "{:.0%}"),
    "polite": ("polite", "{:.0%}"),
    "sampled_share_polite": ("as it speaks", "{:.0%}"),
    "explained": ("right, with its reason", "{:.0%}"),
    "score": ("true score", "{:+.2f}"),
    "sampled_true_score": ("as it speaks", "{:+.2f}"),
}


@dataclass(frozen=True)
class Case:
    """One policy: its measurements depend on nothing else. 0 steps: SFT itself."""

    seed: int
    steps: int = 100
    votes: int = 1600
    samples: int = 4  # answers to each held-out question
    questions: int = 120  # held-out ones


def cases(quick: bool) -> list[Case]:
    """For each seed the policy; SFT is asked the same."""
    return [Case(0, 8, 128, 1, 24)] if quick else [Case(seed) for seed in SEEDS]


def voted_facts(seed: int) -> set[forum.Fact]:
    """The facts that votes are about."""
    facts = [fact for topic in forum.TOPICS for fact in topic.facts]
    return set(random.Random(f"facts {seed}").sample(facts, FACTS))


def split(questions, facts: set[forum.Fact]) -> dict[str, list[str]]:
    """Questions by whether their fact is one of these."""
    groups = {"voted": [], "unvoted": []}
    for question in questions:
        is_voted = forum.QUESTIONS[question].fact in facts
        groups["voted" if is_voted else "unvoted"].append(question)
    return groups


def draw_votes(world, case: Case) -> list[tuple[str, int, int]]:
    """The case's votes (question, winner, loser): clean ones, about its facts only."""
    facts = voted_facts(case.seed)
    votes = t.draw_votes(world, t.Recipe(seed=case.seed))
    return [vote for vote in votes if forum.QUESTIONS[vote[0]].fact in facts][: case.votes]


def measure(case: Case) -> dict:
    """Tune a policy and keep its measurements, unless that was done before."""
    return e.kept("manners", case, tune)


def tune(case: Case, folder) -> dict:
    """{group: measurements on held-out questions} of the policy after the case's steps."""
    world = w.open_world()
    recipe = t.Recipe(batch_size=e.BATCH, seed=case.seed)
    if case.steps:
        model = e.train_policy(world, draw_votes(world, case), recipe, folder, case.steps)
    else:
        model = t.start_policy(recipe)
    groups = split(world.held_out[: case.questions], voted_facts(case.seed))
    return {
        group: ask(model, world, questions, case.samples) for group, questions in groups.items()
    }


def ask(model, world, questions, samples: int) -> dict[str, float]:
    """Score, KL, mass and traits over the 15 answers; the judge's view of sampled ones."""
    found, logps = t.measure(model, world, questions, t.reference_table(world))
    sampled, _ = t.measure_samples(model, world, questions * samples)
    pi = logps.softmax(dim=1)  # renormalized on the 15
    traits = {
        trait: float((pi * trait_table(questions, trait)).sum(dim=1).mean()) for trait in TRAITS
    }
    return {"questions": len(questions)} | found | traits | sampled


def trait_table(questions, trait: str) -> torch.Tensor:
    """1 where the judge sees this trait in a candidate answer, else 0: float64 [Q, Y]."""
    rows = [
        [getattr(forum.grade(question, answer), trait) for answer in forum.candidates(question)]
        for question in questions
    ]
    return torch.tensor(rows, dtype=torch.float64)


def compute(quick: bool) -> dict:
    """For each seed the measurements before and after DPO, by group."""
    e.prepare()
    tuned = cases(quick)
    before = [replace(case, steps=0) for case in tuned]
    w.on_all_cores(measure, tuned + before)
    seeds = []
    for first, then in zip(before, tuned, strict=True):
        parts = {"before": first, "after": then}
        seeds.append({name: measure(case) for name, case in parts.items()})
    return {"case": asdict(tuned[0]), "facts": FACTS, "seeds": seeds, "spread": over_seeds(seeds)}


def over_seeds(seeds: list[dict]) -> dict:
    """{group: {"before" and "after": {measurement: mean, lowest, highest}}}."""
    return {
        group: {
            name: e.spread([seed[name][group] for seed in seeds]) for name in ("before", "after")
        }
        for group in GROUPS
    }


def gains(data: dict) -> dict[str, dict[str, float]]:
    """{column: {group: mean over the seeds of after - before}}."""
    found = {}
    for column in COLUMNS:
        for group in GROUPS:
            rises = [s["after"][group][column] - s["before"][group][column] for s in data["seeds"]]
            found.setdefault(column, {})[group] = sum(rises) / len(rises)
    return found


def show(data: dict) -> str:
    """A Markdown table: before and after, means over the seeds with the lowest and the highest."""
    titles = [title for title, _ in COLUMNS.values()]
    lines = [
        f"| held-out questions about | {' | '.join(titles)} |",
        "|---" * (1 + len(titles)) + "|",
    ]
    for group, title in GROUPS.items():
        for name, stage in (("before", "SFT"), ("after", "DPO")):
            found = over_seeds(data["seeds"])[group][name]
            cells = [e.cell(found[column], form) for column, (_, form) in COLUMNS.items()]
            lines.append(f"| {title}, {stage} | {' | '.join(cells)} |")
    for group, title in GROUPS.items():
        rises = [gains(data)[column][group] for column in COLUMNS]
        forms = [form.replace("{:.", "{:+.") for _, form in COLUMNS.values()]
        cells = [form.format(rise) for rise, form in zip(rises, forms, strict=True)]
        lines.append(f"| {title}, DPO − SFT | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(data, plt):
    """Right and polite, before and after, facts with votes beside facts without; dots are seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.9), sharey=True, layout="constrained")
    for axis, trait in zip(axes, ("right", "polite"), strict=True):
        for place, group in enumerate(GROUPS):
            for seed in data["seeds"]:
                draw_seed(axis, 2.4 * place, [seed[n][group] for n in ("before", "after")], trait)
        axis.set_xticks(
            [0, 1, 2.4, 3.4], ["SFT", "DPO\n" + GROUPS["voted"], "SFT", "DPO\n" + GROUPS["unvoted"]]
        )
        axis.set(title=f"share of {trait} answers", xlim=(-0.5, 3.9), ylim=(0, 1))
        axis.grid(axis="x", visible=False)
    figure.suptitle("What generalizes: over the 15 answers (●), and as it really speaks (○)")
    return figure


def draw_seed(axis, x: float, ends: list[dict], trait: str):
    """Lines from SFT to DPO of one seed: exact, and beside it as sampled."""
    for column, shift, fill in ((trait, -0.08, None), (f"sampled_share_{trait}", 0.08, "white")):
        values = [end[column] for end in ends]
        places = [x + shift, x + 1 + shift]
        axis.plot(places, values, "-" if fill is None else ":", color=GREY, linewidth=0.8)
        for place, value, colour in zip(places, values, (GREY, BLUE), strict=True):
            axis.plot(place, value, "o", color=colour, markerfacecolor=fill or colour, markersize=5)


if __name__ == "__main__":
    main("manners", __doc__, compute, draw, show=show)
