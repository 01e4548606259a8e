"""The dose: how high a learning rate and how low a beta, for how long, before the policy breaks?

    python figures/dose.py [--draw]      12 policies of 300 steps, 17 minutes of two cores
    python figures/dose.py --quick       four policies of a few steps, to see that all of it works

DPO on 1,600 clean votes of the forum, three epochs of 100 steps of 16 votes. After each epoch: the
true score of what the policy really says to 60 held-out questions, and what a run without a judge
could know too. The rate rises and falls over the whole run, so epoch 1 is not a run of one epoch.

Then the early warning. A point, that is a run after an epoch, is bad if the true score of what it
says is below SFT's, or more than 0.5 below the best that its run had so far. How well does each
signal tell the bad points from the good ones? AUC; and the hits and false alarms at a threshold
that was fitted to the other runs only. 36 points of 12 runs are few: differences of less than 0.1
mean nothing.
"""

import itertools
from dataclasses import asdict, dataclass

import epochs as e
import tuning as t
import world as w
from drawing import BLUE, ORANGE, main
from roc import auc, best_threshold, leave_one_out, rates

from dpo_minimal import InputError
from dpo_minimal.generate import sample_answers

RATES = (5e-4, 1.5e-3, 3e-3, 6e-3)
BETAS = (0.1, 0.3, 1.0)
FALL = 0.5  # points of true score below the run's best that make a point bad
SIGNALS = {  # title: metric, and 1 if it is suspect where it is high, -1 where it is low
    "KL of its own answers": ("sampled_kl", 1),
    "endless answers": ("share_endless", 1),
    "log-prob. of chosen, per token": ("chosen_logp", -1),
    "margin of training pairs": ("margin", 1),
    "accuracy on training pairs": ("accuracy", 1),
    "garbled answers (the judge's)": ("sampled_share_garbled", 1),
}


@dataclass(frozen=True)
class Case:
    """One policy: its measurements depend on nothing else. 0 epochs: SFT itself."""

    learning_rate: float
    beta: float
    epochs: int = 3
    votes: int = 1600
    questions: int = 60  # held-out ones
    seed: int = 0


def cases(quick: bool) -> list[Case]:
    """All policies; SFT is the first."""
    size = dict(votes=64, questions=8) if quick else {}
    epochs = 2 if quick else 3
    grid = itertools.product(BETAS[::2] if quick else BETAS, RATES[::3] if quick else RATES)
    return [Case(0.0, 1.0, 0, **size), *(Case(rate, beta, epochs, **size) for beta, rate in grid)]


def measure(case: Case) -> dict:
    """Tune a policy and keep what it was like after each epoch, unless that was done before."""
    return e.kept("dose", case, tune)


def tune(case: Case, folder) -> dict:
    """{"course": measurements after each epoch}; with "stopped" if the loss became infinite."""
    world = w.open_world()
    recipe = t.Recipe(
        beta=case.beta, learning_rate=case.learning_rate, batch_size=e.BATCH, seed=case.seed
    )
    votes = t.draw_votes(world, recipe)[: case.votes]
    if not case.epochs:
        return {"course": [look_at(t.start_policy(recipe), world, case, votes)]}
    found, every = [], len(votes) // e.BATCH

    def look(model):
        found.append(look_at(model, world, case, votes))
        return found[-1]

    try:
        e.train_policy(world, votes, recipe, folder, case.epochs * every, look, every)
    except InputError as error:
        return {"course": found, "stopped": str(error)}
    return {"course": found}


def look_at(model, world, case: Case, votes) -> dict[str, float]:
    """What a policy says to held-out questions, and what it thinks of a fifth of the votes."""
    questions = w.asked(world)["held_out"][: case.questions]
    ids = sample_answers(model, world.tokenizer, questions, 64, seed=0)
    found, _ = t.measure(model, world, questions, t.reference_table(world))
    sampled, _ = t.judge_samples(model, world, questions, ids)
    some = votes[::5]
    logps, ref = e.vote_logps(model, world, some), e.reference_vote_logps(world, some)
    chosen, rejected = (logps - ref).T
    tokens = sum(len(world.tokens[question][1 + winner]) for question, winner, _ in some)
    margins = case.beta * (chosen - rejected)
    endless = [answer[-1] != world.tokenizer.eos_id for answer in ids]
    return found | {
        **sampled,
        "share_endless": sum(endless) / len(endless),
        "chosen_logp": float(logps[:, 0].sum()) / tokens,
        "chosen_change": float(chosen.sum()) / tokens,  # since SFT
        "margin": float(margins.mean()),
        "accuracy": float((margins > 0).float().mean()),
    }


def compute(quick: bool) -> dict:
    """SFT's measurements, each run's after each epoch, and what each signal is worth."""
    e.prepare()
    every = cases(quick)
    sft, *results = w.on_all_cores(measure, every)
    runs = [asdict(case) | result for case, result in zip(every[1:], results, strict=True)]
    return {"sft": sft["course"][0], "runs": runs} | early_warning(sft["course"][0], runs)


# --- the early warning ------------------------------------------------------------------------


def bad_points(scores: list[float], start: float) -> list[bool]:
    """Whether each score of a run, in order, is below the start, or FALL below its best so far."""
    best, found = start, []
    for score in scores:
        found.append(score < start or score < best - FALL)
        best = max(best, score)
    return found


def early_warning(sft: dict, runs: list[dict]) -> dict:
    """How many points there are, how many are bad, and how well each signal tells them apart."""
    bad = []
    for run in runs:
        scores = [point["sampled_true_score"] for point in run["course"]]
        bad.append(bad_points(scores, sft["sampled_true_score"]))
    flat = list(itertools.chain(*bad))
    signals = {}
    for title, (metric, sign) in SIGNALS.items():
        values = [[sign * point[metric] for point in run["course"]] for run in runs]
        signals[title] = worth(values, bad) | {"sign": sign}
    return {"points": len(flat), "bad": sum(flat), "signals": signals}


def worth(values: list[list[float]], bad: list[list[bool]]) -> dict:
    """A signal's AUC, its rates at the best threshold, and those with each run left out once.

    values, bad: for each run, for each of its points. What cannot be said is None.
    """
    flat, is_bad = list(itertools.chain(*values)), list(itertools.chain(*bad))
    pairs = list(zip(flat, is_bad, strict=True))
    area = auc([v for v, b in pairs if b], [v for v, b in pairs if not b])
    found = dict.fromkeys(("auc", "threshold", "hits", "false_alarms", "new_hits", "new_false"))
    if area is None:
        return found
    threshold = best_threshold(flat, is_bad)
    hits, false = rates([value >= threshold for value in flat], is_bad)
    found |= {"auc": area, "threshold": threshold, "hits": hits, "false_alarms": false}
    runs = [list(zip(*run, strict=True)) for run in zip(values, bad, strict=True)]
    new = leave_one_out(runs)
    return found | (dict(zip(("new_hits", "new_false"), new, strict=True)) if new else {})


# --- tables and picture -----------------------------------------------------------------------


def grid_of(data: dict, epoch: int) -> tuple[list[float], list[float], dict]:
    """(betas, rates, {(beta, rate): true score as it speaks}) after an epoch, counted from 0."""
    runs = data["runs"]
    betas, rates = (sorted({run[name] for run in runs}) for name in ("beta", "learning_rate"))
    scores = {
        (run["beta"], run["learning_rate"]): run["course"][epoch]["sampled_true_score"]
        for run in runs
        if epoch < len(run["course"])
    }
    return betas, rates, scores


def show(data: dict) -> str:
    """Markdown tables: the sampled true score after each epoch, and the signals."""
    lines = [f"SFT says {data['sft']['sampled_true_score']:+.2f}"]
    for epoch in range(data["runs"][0]["epochs"]):
        betas, rates, scores = grid_of(data, epoch)
        lines += ["", f"| after epoch {epoch + 1} | {' | '.join(f'{r:g}' for r in rates)} |"]
        lines.append("|---" * (1 + len(rates)) + "|")
        for beta in betas:
            cells = [number(scores.get((beta, rate)), "{:+.2f}") for rate in rates]
            lines.append(f"| beta {beta:g} | {' | '.join(cells)} |")
    lines += ["", f"{data['bad']} of {data['points']} points are bad", ""]
    lines += ["| signal | AUC | hits | false alarms | hits, other runs' threshold | false alarms |"]
    lines.append("|---" * 6 + "|")
    for title, found in data["signals"].items():
        names = ("hits", "false_alarms", "new_hits", "new_false")
        cells = [number(found["auc"], "{:.2f}"), *(number(found[n], "{:.0%}") for n in names)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value, form: str) -> str:
    """A number in its form; a dash if there is none."""
    return "–" if value is None else form.format(value)


def draw(data, plt):
    """A map per epoch, learning rate x beta, and below it what each signal is worth."""
    epochs = data["runs"][0]["epochs"]
    layout = [list(range(epochs)), ["signals"] * epochs]
    figure, axes = plt.subplot_mosaic(layout, figsize=(3.6 * epochs, 6), layout="constrained")
    sft = data["sft"]["sampled_true_score"]
    for epoch in range(epochs):
        draw_map(axes[epoch], *grid_of(data, epoch), sft)
        axes[epoch].set_title(f"after epoch {epoch + 1}")
    axes[0].set_ylabel("β")
    draw_signals(axes["signals"], data["signals"])
    figure.suptitle(
        f"True score of what DPO says. SFT: {sft:+.2f}; red and beyond the black line: below SFT"
    )
    return figure


def draw_map(axis, betas, rates, scores, sft):
    """The scores as colours and numbers: blue above SFT, red below, a line at the cliff."""
    cells = [[scores.get((beta, rate), float("nan")) for rate in rates] for beta in betas]
    limits = dict(vmin=sft - 4, vmax=sft + 4)
    axis.pcolormesh(cells, cmap="RdBu", edgecolors="white", linewidth=1, **limits)
    for (y, beta), (x, rate) in itertools.product(enumerate(betas), enumerate(rates)):
        score = scores.get((beta, rate))
        is_dark = score is not None and abs(score - sft) > 2.4
        style = dict(color="white" if is_dark else "black", ha="center", va="center")
        axis.text(x + 0.5, y + 0.5, number(score, "{:+.2f}"), **style)
        for right, up in ((1, 0), (0, 1)):  # a line to a neighbour on the other side of SFT
            if x + right < len(rates) and y + up < len(betas):
                other = cells[y + up][x + right]
                if (cells[y][x] >= sft) != (other >= sft):  # a stopped run is below, too
                    ends = ([x + 1, x + 1], [y, y + 1]) if right else ([x, x + 1], [y + 1, y + 1])
                    axis.plot(*ends, color="black", linewidth=2.5)
    axis.set(xlabel="learning rate")
    axis.set_xticks([x + 0.5 for x in range(len(rates))], [f"{rate:g}" for rate in rates])
    axis.set_yticks([y + 0.5 for y in range(len(betas))], [f"{beta:g}" for beta in betas])
    axis.grid(False)


def draw_signals(axis, signals: dict):
    """Each signal's AUC, and its hits and false alarms where the threshold is the other runs'."""
    names = [name for name, found in signals.items() if found["auc"] is not None]
    for y, name in enumerate(reversed(names)):
        found = signals[name]
        axis.plot([0.5, found["auc"]], [y, y], color=BLUE, linewidth=1)
        axis.plot(found["auc"], y, "o", color=ORANGE if "judge" in name else BLUE)
        text = f"hits {number(found['new_hits'], '{:.0%}')}, "
        text += f"false alarms {number(found['new_false'], '{:.0%}')}"
        axis.text(1.03, y, text, va="center", fontsize=8.5)
    axis.set_yticks(range(len(names)), list(reversed(names)))
    axis.set(xlim=(0, 1.4), xlabel="AUC: P(a bad point looks worse than a good one)")
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axis.grid(axis="y", visible=False)
    axis.set_title("signals of a run without a judge (orange: the judge's own)")


if __name__ == "__main__":
    main("dose", __doc__, compute, draw, show=show)
