"""Who may judge a run without a judge: do the margins of training pairs betray the bad votes?

    python figures/votes.py [--draw]     12 policies of 300 steps, 15 minutes of two cores
    python figures/votes.py --quick      four policies of a few steps, to see that all of it works

Among 1,600 votes of the forum are planted: 15% turned around, 10% copies of honest votes, half of
them turned around, and 10% that went to the longer answer. DPO trains three epochs on all of them;
each vote's margin is taken at the end of each epoch, without dropout. Low margins are suspect.
How well do they tell each kind from honest votes? Some honest votes are upsets, which the worse
answer won by chance: they are as wrong as a vote turned around, so they count as a kind of their
own, and the AUC is given against honest votes with them and without them.

Then 15% of the votes are dropped, those with the lowest mean margin, and training begins again from
SFT, for as many steps. It is compared with all votes, with 15% dropped by lot, and with the honest
votes alone.
"""

import random
from collections import Counter
from dataclasses import asdict, dataclass, replace

import epochs as e
import tuning as t
import world as w
from drawing import BLUE, GREEN, GREY, ORANGE, main
from roc import auc

from dpo_minimal import forum

SHARES = {"flipped": 0.15, "copy": 0.05, "turned copy": 0.05, "length": 0.1}  # planted
HONEST = ("honest", "upset")
DROPPED = 0.15
KEPT = {  # which votes a policy is trained on
    "all": "all votes",
    "lot": "15% dropped by lot",
    "judged": "15% dropped by margin",
    "honest": "honest votes only",
}
RANKINGS = ("mean margin", "last margin", "first epoch")
COLUMNS = {
    "score": ("true score", "{:+.2f}"),
    "sampled_true_score": ("as it speaks", "{:+.2f}"),
    "kl": ("KL", "{:.2f}"),
    "mass": ("mass on the 15", "{:.0%}"),
    "sampled_share_garbled": ("garbled", "{:.0%}"),
}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """One policy: its measurements depend on nothing else."""

    seed: int
    kept: str  # a key of KEPT
    votes: int = 1600
    epochs: int = 3  # of all the votes; with fewer votes there are as many steps
    questions: int = 60  # held-out ones


# --- the votes --------------------------------------------------------------------------------


def planted_votes(world, seed: int, count: int) -> list[tuple[str, str, int, int]]:
    """Votes (kind, question, winner, loser). Kinds are those of SHARES, "honest" and "upset"."""
    drawn = t.draw_votes(world, t.Recipe(seed=seed))[:count]
    rng = random.Random(f"planted {seed}")
    kinds = [kind for kind, share in SHARES.items() for _ in range(round(share * count))]
    kinds += ["honest"] * (count - len(kinds))
    rng.shuffle(kinds)
    honest = [vote for vote, kind in zip(drawn, kinds, strict=True) if kind == "honest"]
    return [plant(world, vote, kind, honest, rng) for vote, kind in zip(drawn, kinds, strict=True)]


def plant(world, vote, kind: str, honest, rng) -> tuple[str, str, int, int]:
    """The vote that stands in a vote's place if it is of this kind. honest: what to copy from."""
    if "copy" in kind:
        vote = rng.choice(honest)
    question, winner, loser = vote
    if kind == "length":
        words = [len(answer.split()) for answer in forum.candidates(question)]
        turn = words[loser] > words[winner]  # a tie stays as it was
    else:
        turn = kind in ("flipped", "turned copy")
    if kind == "honest" and is_wrong(world, vote):
        kind = "upset"
    return (kind, question, loser, winner) if turn else (kind, question, winner, loser)


def is_wrong(world, vote) -> bool:
    """Whether the winner's true score is below the loser's."""
    question, winner, loser = vote
    return bool(world.scores[question][winner] < world.scores[question][loser])


def worst(suspicion: list[float], share: float) -> set[int]:
    """The places of the most suspicious votes, this share of them; the earlier ones of equals."""
    order = sorted(range(len(suspicion)), key=lambda i: -suspicion[i])
    return set(order[: round(share * len(suspicion))])


def suspicions(margins: list[list[float]]) -> dict[str, list[float]]:
    """{ranking: a number per vote, high is suspect}, from the margins after each epoch."""
    means = [sum(course) / len(course) for course in zip(*margins, strict=True)]
    return {
        ranking: [-margin for margin in values]
        for ranking, values in zip(RANKINGS, (means, margins[-1], margins[0]), strict=True)
    }


# --- policies ---------------------------------------------------------------------------------


def kept_votes(votes, case: Case) -> list[tuple[str, int, int]]:
    """The votes (question, winner, loser) that the case's policy is trained on."""
    dropped = set()
    if case.kept == "lot":
        number = round(DROPPED * len(votes))
        dropped = set(random.Random(f"lot {case.seed}").sample(range(len(votes)), number))
    elif case.kept == "judged":
        margins = measure(replace(case, kept="all"))["margins"]
        dropped = worst(suspicions(margins)["mean margin"], DROPPED)
    elif case.kept == "honest":
        dropped = {i for i, (kind, *_) in enumerate(votes) if kind not in HONEST}
    return [tuple(vote) for i, (_, *vote) in enumerate(votes) if i not in dropped]


def measure(case: Case) -> dict:
    """Tune a policy and keep its measurements, unless that was done before."""
    return e.kept("votes", case, tune)


def tune(case: Case, folder) -> dict:
    """The policy's measurements; for all votes with "margins", after each epoch one per vote."""
    world = w.open_world()
    planted = planted_votes(world, case.seed, case.votes)
    votes = kept_votes(planted, case)
    recipe = t.Recipe(batch_size=e.BATCH, seed=case.seed)
    margins, every = [], case.votes // e.BATCH

    def look(model):
        margins.append(e.vote_margins(model, world, votes, recipe.beta).tolist())
        return {}

    look = look if case.kept == "all" else None
    model = e.train_policy(
        world, votes, recipe, folder, steps=case.epochs * every, look=look, every=every
    )
    questions = w.asked(world)["held_out"][: case.questions]
    found = e.exact_and_sampled(model, world, questions) | {"votes": len(votes)}
    return found | ({"margins": margins} if look else {})


def compute(quick: bool) -> dict:
    """For each seed how well each ranking finds each kind, what was dropped, and the policies."""
    e.prepare()
    size = dict(votes=32, epochs=2, questions=4) if quick else {}
    seeds = SEEDS[:1] if quick else SEEDS
    every = [{kept: Case(seed, kept, **size) for kept in KEPT} for seed in seeds]
    # What is dropped by margin is known when the policies of all votes are there.
    w.on_all_cores(measure, [c for cases in every for k, c in cases.items() if k != "judged"])
    w.on_all_cores(measure, [cases["judged"] for cases in every])
    data = {"case": asdict(every[0]["all"]), "seeds": [result(cases) for cases in every]}
    return data | {"spread": summary(data)}


def summary(data: dict) -> dict:
    """Means, lowest and highest over the seeds: the AUC of each kind, and each policy."""
    ranking, kinds = RANKINGS[0], (*SHARES, "upset")
    return {
        "auc": {kind: over_seeds(data, "auc", ranking, kind, "no_upsets") for kind in kinds},
        "dropped": {
            kind: over_seeds(data, "kinds", kind, "dropped") for kind in (*kinds, "honest")
        },
        **{
            kept: {column: over_seeds(data, "policies", kept, column) for column in COLUMNS}
            for kept in KEPT
        },
    }


def result(cases: dict[str, Case]) -> dict:
    """A seed's part of the result."""
    world, case = w.open_world(), cases["all"]
    planted = planted_votes(world, case.seed, case.votes)
    policies = {kept: measure(case) for kept, case in cases.items()}
    margins = policies["all"].pop("margins")
    found = suspicions(margins)
    return {
        "kinds": describe(world, planted, worst(found["mean margin"], DROPPED)),
        "auc": {ranking: kind_aucs(planted, values) for ranking, values in found.items()},
        "policies": policies,
    }


def describe(world, planted, dropped: set[int]) -> dict[str, dict[str, float]]:
    """{kind: how many, the share that the worse answer won, the share that was dropped}."""
    counts, wrong, gone = Counter(), Counter(), Counter()
    for i, (kind, *vote) in enumerate(planted):
        counts[kind] += 1
        wrong[kind] += is_wrong(world, vote)
        gone[kind] += i in dropped
    return {
        kind: {"votes": n, "wrong": wrong[kind] / n, "dropped": gone[kind] / n}
        for kind, n in counts.items()
    }


def kind_aucs(planted, suspicion: list[float]) -> dict[str, dict[str, float | None]]:
    """{kind: AUC against all honest votes, and against those that are no upsets}."""
    by_kind = {}
    for (kind, *_), value in zip(planted, suspicion, strict=True):
        by_kind.setdefault(kind, []).append(value)
    plain, upsets = by_kind.get("honest", []), by_kind.get("upset", [])
    by_kind["all planted"] = [v for k in SHARES for v in by_kind.get(k, [])]
    found = {}
    for kind in (*SHARES, "all planted", "upset"):
        against = {"no_upsets": auc(by_kind.get(kind, []), plain)}
        if kind != "upset":
            against["all_honest"] = auc(by_kind.get(kind, []), plain + upsets)
        found[kind] = against
    return found


# --- tables and picture -----------------------------------------------------------------------


def over_seeds(data: dict, *path) -> dict[str, float] | None:
    """Mean, lowest and highest over the seeds of the number at this path; None if one has none."""
    values = []
    for found in data["seeds"]:
        for name in path:
            found = (found or {}).get(name)
        values.append({"value": found})
    return None if {"value": None} in values else e.spread(values)["value"]


def mean_cell(found: dict | None, form: str) -> str:
    """The mean of `over_seeds`; a dash if there is none."""
    return "–" if found is None else form.format(found["mean"])


def show(data: dict) -> str:
    """Two Markdown tables: what each ranking finds, and what training without it gives."""
    return f"{show_kinds(data)}\n\n{show_policies(data)}"


def show_kinds(data: dict) -> str:
    """A table of the kinds of votes: how many, how wrong, how many were dropped, and the AUCs."""
    forms = {"votes": "{:.0f}", "wrong": "{:.0%}", "dropped": "{:.0%}"}
    heads = [*forms, *RANKINGS, "(against upsets, too)"]
    lines = [f"| kind | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for kind in ("honest", "upset", *SHARES, "all planted"):
        cells = [mean_cell(over_seeds(data, "kinds", kind, n), form) for n, form in forms.items()]
        for ranking in RANKINGS:
            cells.append(mean_cell(over_seeds(data, "auc", ranking, kind, "no_upsets"), "{:.2f}"))
        both = over_seeds(data, "auc", RANKINGS[0], kind, "all_honest")
        lines.append(f"| {kind} | {' | '.join([*cells, mean_cell(both, '{:.2f}')])} |")
    return "\n".join(lines)


def show_policies(data: dict) -> str:
    """A table of the policies, means over the seeds with the lowest and the highest."""
    titles = [title for title, _ in COLUMNS.values()]
    lines = [f"| trained on | votes | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
    for kept, title in KEPT.items():
        cells = [mean_cell(over_seeds(data, "policies", kept, "votes"), "{:.0f}")]
        for column, (_, form) in COLUMNS.items():
            cells.append(e.cell(over_seeds(data, "policies", kept, column), form))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(data, plt):
    """How well each ranking finds each kind, and what dropping the suspects gives; dots: seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    kinds = [*SHARES, "upset"]
    for shift, ranking, colour in zip((-0.2, 0, 0.2), RANKINGS, (BLUE, GREEN, ORANGE), strict=True):
        for place, kind in enumerate(kinds):
            for seed in data["seeds"]:
                area = seed["auc"][ranking][kind]["no_upsets"]
                left.plot(place + shift, area, "o", color=colour, markersize=4)
        left.plot([], [], "o", color=colour, markersize=4, label=ranking)
    left.axhline(0.5, color=GREY, linewidth=1)
    left.set_xticks(range(len(kinds)), kinds)
    left.set(title="AUC of a low margin, against honest votes", ylim=(0, 1))
    left.legend(frameon=False, loc="lower left")
    for place, kept in enumerate(KEPT):
        for seed in data["seeds"]:
            policy = seed["policies"][kept]
            right.plot(place - 0.1, policy["score"], "o", color=BLUE, markersize=5)
            spoken = dict(color=BLUE, markerfacecolor="white", markersize=5)
            right.plot(place + 0.1, policy["sampled_true_score"], "o", **spoken)
    names = [title.replace(" dropped", " dropped\n") for title in KEPT.values()]
    right.set_xticks(range(len(KEPT)), names)
    right.set_title("true score after 300 steps on")
    figure.suptitle("Margins as judges of votes: over the 15 answers (●), as it really speaks (○)")
    return figure


if __name__ == "__main__":
    main("votes", __doc__, compute, draw, show=show)
