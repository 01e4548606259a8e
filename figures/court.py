"""The court of losses: all from the same SFT and the same votes, judged by the truth.

    python figures/court.py [--draw]     the whole: 210 policies, each on one core, 75 minutes of
                                         two. An interrupted run goes on
    python figures/court.py --quick      each loss once, briefly, to see that all of it works

Each loss has one setting, chosen beforehand and not searched for; a sweep then tries a third and
three times of its beta. 100 votes and 1,000 get as many steps, so that nothing but the votes
differs. All 3,600 clean votes are seen once, in as many steps as that takes, and with one seed.
Each policy gives two points of reward against KL: renormalized over the 15 answers of a question
(exact), and as it really speaks (sampled, with whatever it garbles). Measured policies are kept in
runs/figures/court, so delete that after changing a loss. Base and SFT are made first if they are
not there, in some minutes.
"""

import itertools
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import epochs as e
import torch
import tuning as t
import world as w
from drawing import BLUE, GREY, ORANGE, label, main

from benchmarks.record import in_turn
from dpo_minimal.extras.losses import REFERENCE_FREE, LossSettings, batch_lengths, preference_loss
from dpo_minimal.extras.reading import read_json
from dpo_minimal.extras.report import win_rate
from dpo_minimal.files import write_json
from dpo_minimal.generate import sample_answers
from dpo_minimal.loop import Settings
from dpo_minimal.loss import preference_logps, reward_metrics
from dpo_minimal.reference import known_reference_logps, new_table

# beta 1 is the forum's. SimPO's is 16, about the mean length, because it is of means per token.
LOSSES = {
    "DPO": LossSettings("sigmoid", 1.0),
    "cDPO 0.3": LossSettings("sigmoid", 1.0, label_smoothing=0.3),
    "robust 0.3": LossSettings("robust", 1.0, label_smoothing=0.3),
    "IPO 0.2": LossSettings("ipo", 0.2),
    "hinge": LossSettings("hinge", 1.0),
    "DPO + NLL": LossSettings("sigmoid", 1.0, nll_weight=1.0),
    "SimPO": LossSettings("simpo", 16.0, simpo_gamma=0.5),
    "ORPO": LossSettings("orpo", 1.0),
    "KTO": LossSettings("kto", 1.0),
    "APO-zero": LossSettings("apo_zero", 1.0),
}
VOTES = {  # what is wrong with the votes
    "clean": t.Recipe(),
    "30% wrong": t.Recipe(flipped=0.3),
    "for length": t.Recipe(points_per_word=0.5),
}
SPOKEN = "sampled_true_score"
FEW, MANY, ALL = 100, 1000, 3600  # votes; 1,000 are one epoch of 100 steps
SEEDS = (0, 1, 2)
COLUMNS = {
    "score": ("true score", "{:+.2f}"),
    "sampled_true_score": ("as it speaks", "{:+.2f}"),
    "kl": ("KL", "{:.2f}"),
    "sampled_kl": ("as it speaks", "{:.2f}"),
    "share_of_gain": ("share of the gain", "{:.0%}"),
    "mass": ("mass on the 15", "{:.0%}"),
    "sampled_share_garbled": ("garbled", "{:.0%}"),
    "wins": ("wins against SFT", "{:.0%}"),
}


@dataclass(frozen=True)
class Case:
    """One policy: its measurements depend on nothing else."""

    settings: LossSettings
    votes: str = "clean"
    count: int = MANY
    seed: int = 0
    steps: int = 100
    batch_size: int = 10
    questions: int = 60  # held-out ones, for measurements

    def condition(self) -> str:
        """What the votes are like."""
        return f"{self.count:,} votes, {self.votes}"


def cases(quick: bool):
    """(name of the loss, Case) of all policies: each condition, loss and seed; all votes: one."""
    if quick:
        for name, settings in LOSSES.items():
            yield name, Case(settings, steps=8, questions=10)
        return
    for seed, count, votes in itertools.product(SEEDS, (MANY, FEW), VOTES):
        for name, settings in LOSSES.items():
            yield name, Case(settings, votes, count, seed)
    for name, settings in LOSSES.items():
        yield name, Case(settings, count=ALL, steps=ALL // Case.batch_size)


def sweep_cases():
    """(name, Case): each loss with a third and three times its beta, one seed."""
    for factor, (name, settings) in itertools.product((1 / 3, 3), LOSSES.items()):
        beta = settings.beta * factor
        yield f"{name}, beta {beta:.2g}", Case(replace(settings, beta=beta))


def measure(case: Case) -> dict[str, float]:
    """A policy's measurements; it is tuned unless that was done before."""
    return e.kept("court", case, tune_and_judge)


def tune_and_judge(case: Case, folder) -> dict[str, float]:
    """Tune a policy from the reference's table, and measure it."""
    world = w.open_world()
    votes = draw_votes(world, case)
    model = tune(world, case, votes, e.reference_vote_logps(world, votes), folder)
    return judge(world, case, model, sft_answers(world))


def draw_votes(world, case: Case) -> list[tuple[str, int, int]]:
    """The case's votes, (question, winner, loser). They are drawn by its seed."""
    return t.draw_votes(world, replace(VOTES[case.votes], seed=case.seed))[: case.count]


def tune(world, case: Case, votes, table, folder):
    """The policy after training. table: the reference's log-probabilities, NaN if not known yet."""

    def objective(model, batch):
        policy_chosen_logps, policy_rejected_logps = preference_logps(model, batch)  # [B] each
        ref_chosen_logps, ref_rejected_logps = known_reference_logps(model, batch, table).T
        losses, chosen_rewards, rejected_rewards = preference_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            lengths=batch_lengths(batch),
            settings=case.settings,
        )
        return losses, reward_metrics(
            policy_chosen_logps, policy_rejected_logps, chosen_rewards, rejected_rewards
        )

    recipe = t.Recipe(seed=case.seed)
    settings = Settings(recipe.learning_rate, case.batch_size, epochs=1e6, max_steps=case.steps)
    return t.train_on(world, votes, recipe, objective, settings, folder, evaluate=None)


def seconds_per_step(world, rounds: int = 3, steps: int = 6) -> dict[str, float]:
    """{loss: seconds}, the least of some rounds in turn, with the reference's pass where needed."""
    found = dict.fromkeys(LOSSES, float("inf"))
    names = itertools.chain(*(in_turn(list(LOSSES), number) for number in range(rounds)))
    for name in names:
        case = Case(LOSSES[name], steps=steps)
        votes = draw_votes(world, case)
        is_free = case.settings.loss in REFERENCE_FREE
        table = torch.zeros(len(votes), 2) if is_free else new_table(len(votes))
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            tune(world, case, votes, table, Path(folder))
            found[name] = min(found[name], (time.perf_counter() - started) / steps)
    return found


def judge(world, case: Case, model, sft_texts) -> dict[str, float]:
    """A policy's two points on held-out questions, and its wins against SFT's answers."""
    questions = w.asked(world)["held_out"][: case.questions]
    ref, scores = (w.stack(table, questions) for table in (t.reference_table(world), world.scores))
    found = w.exact_with_share(w.answer_logps(model, world, questions), ref, scores)
    sampled, texts = t.measure_samples(model, world, questions)
    return found | sampled | {"wins": win_rate(questions, texts, sft_texts[: len(texts)])}


def sft_answers(world) -> list[str]:
    """SFT's sampled answers to the held-out questions. Kept in a file."""
    path = w.RUN / "court" / "sft.json"
    if not path.exists():
        model = t.start_policy(t.Recipe())  # a new adapter changes nothing yet
        questions = w.asked(world)["held_out"]
        ids = sample_answers(model, world.tokenizer, questions, 64, seed=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"texts": [world.tokenizer.decode(answer).strip() for answer in ids]})
    return read_json(path)["texts"]


def compute(quick: bool) -> dict:
    """{condition: {loss: measurements}}, means over the seeds, with the lowest and the highest."""
    world = w.open_world()
    sft_answers(world), t.reference_table(world)  # made once, before the processes start
    heard, sweep = list(cases(quick)), [] if quick else list(sweep_cases())
    seconds = seconds_per_step(world, rounds=1 if quick else 3)
    results = w.on_all_cores(measure, [case for _, case in heard + sweep])
    found = {}
    for (name, case), result in zip(heard, results, strict=False):
        found.setdefault(case.condition(), {}).setdefault(name, []).append(result)
    questions = w.asked(world)["held_out"]
    ref, scores = (w.stack(table, questions) for table in (t.reference_table(world), world.scores))
    return {
        "losses": {name: asdict(settings) for name, settings in LOSSES.items()},
        "seconds_per_step": seconds,
        "frontier": w.frontier(ref, scores, [0.1 * 1.25**i for i in range(28)]),
        "sweep": {
            name: result for (name, _), result in zip(sweep, results[len(heard) :], strict=True)
        },
    } | {
        condition: {name: e.spread(seeds) for name, seeds in losses.items()}
        for condition, losses in found.items()
    }


def conditions(data: dict) -> dict[str, dict]:
    """The parts of the result that are conditions."""
    return {name: part for name, part in data.items() if " votes, " in name}


def format_tables(data: dict) -> str:
    """A Markdown table for each condition, means over the seeds."""
    lines, titles = [], [title for title, _ in COLUMNS.values()]
    for condition, losses in conditions(data).items():
        lines += ["", condition, "", f"| loss | {' | '.join(titles)} |"]
        lines.append("|---" * (1 + len(COLUMNS)) + "|")
        for name, found in losses.items():
            cells = [e.cell(found[metric], form) for metric, (_, form) in COLUMNS.items()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(data, plt):
    """Policies of 1,000 votes beside the frontier; below, each loss with its range, also of 100."""
    parts = conditions(data)
    figure, grid = plt.subplots(
        3, len(VOTES), figsize=(11, 9.6), sharey="row", sharex="row", layout="constrained"
    )
    for column, votes in enumerate(VOTES):
        draw_frontier(grid[0, column], data["frontier"], parts[f"{MANY:,} votes, {votes}"])
        grid[0, column].set_title(f"votes: {votes}")
        for row, count in enumerate((MANY, FEW), start=1):
            draw_ranges(grid[row, column], parts[f"{count:,} votes, {votes}"], f"{count:,} votes")
    grid[0, 0].set_ylabel("true score")
    curve = data["frontier"][7]
    label(grid[0, 0], curve["kl"], curve["score"], "the best for its KL", GREY, (6, -14))
    label(grid[0, 0], 1.0, 0.6, "over the 15 answers", BLUE)
    label(grid[0, 0], 1.0, 0.1, "as it speaks", ORANGE)
    figure.suptitle("Ten losses on the same votes (below: means and ranges of three seeds)")
    return figure


def draw_frontier(axis, frontier, losses):
    """Both points of each policy, joined by a line."""
    axis.plot([p["kl"] for p in frontier], [p["score"] for p in frontier], color=GREY, zorder=1)
    for found in losses.values():
        exact, spoken = points(found)
        axis.plot(*zip(exact, spoken, strict=True), "-", color=GREY, linewidth=0.6)
        axis.plot(*exact, "o", color=BLUE, markersize=4)
        axis.plot(*spoken, "o", color=ORANGE, markersize=4)
    axis.set(xlim=(-0.1, 2.9), ylim=(-1.3, 3.9), xlabel="KL to SFT, nats")


def draw_ranges(axis, losses, votes: str):
    """A row per loss: the score over the 15 answers and as it speaks, means and ranges."""
    for up, metric, colour in ((0.15, "score", BLUE), (-0.15, SPOKEN, ORANGE)):
        found = [values[metric] for values in reversed(losses.values())]
        ys = [y + up for y in range(len(found))]
        low, mean, high = ([values[name] for values in found] for name in ("min", "mean", "max"))
        axis.hlines(ys, low, high, color=colour)
        axis.plot(mean, ys, "o", color=colour, markersize=4)
    axis.set_yticks(range(len(losses)), list(reversed(losses)))
    axis.set(xlabel=f"true score, {votes}", xlim=(-1.3, 2.3))


def points(found: dict) -> tuple[tuple[float, float], tuple[float, float]]:
    """A loss's two points (KL, true score): over the 15 answers, and as it speaks."""
    return (
        (found["kl"]["mean"], found["score"]["mean"]),
        (found["sampled_kl"]["mean"], found[SPOKEN]["mean"]),
    )


if __name__ == "__main__":
    main("court", __doc__, compute, draw, show=format_tables)
