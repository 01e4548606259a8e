"""Too hot, too long: training looks better and better while the judge's scores fall.

    python figures/overoptimization.py [--draw]

Hot: beta 0.1 and twice the learning rate, one epoch. Long: beta 1 as in the healthy run, but eight
epochs over the same votes. The healthy run is that of closed_form.py.
"""

from dataclasses import replace

import tuning as t
import world as w
from drawing import BLUE, GREY, RED, label, main

HEALTHY = t.Recipe()
EPOCH = 113  # steps: 3,600 votes, 32 in each
RUNS = {
    "hot": t.Recipe(beta=0.1, learning_rate=3e-3, eval_every=19, sample_every=True),
    "long": replace(HEALTHY, epochs=8.0, eval_every=EPOCH, sample_every=True),
}
TITLES = {"hot": "β = 0.1, twice the rate", "long": "β = 1, eight epochs"}
PANELS = {
    "rewards/accuracies": "training: pairs ranked right",
    "held_out/sampled_true_score": "true score of sampled answers",
    "held_out/sampled_share_garbled": "share of answers with nonsense",
    "held_out/mass": "probability of the 15 answers",
}


def compute() -> dict:
    """Each run over its steps: what training sees, and what the judge sees."""
    world = w.open_world()
    t.tune_all([*RUNS.values(), HEALTHY])
    healthy = t.tune(world, HEALTHY)
    data = {"questions": world.held_out[:4], "healthy_answers": healthy["samples"][:4]}
    data["healthy_end"] = healthy["held_out"]
    for name, recipe in RUNS.items():
        result = t.tune(world, recipe)
        data[name] = {
            "settings": result["recipe"],
            "cpu_seconds": result["cpu_seconds"],
            "course": [with_training(point, result["rows"]) for point in result["course"]],
            "end": result["held_out"],
            "answers": result["samples"][:4],
        }
    return data


def with_training(point: dict, rows: list[dict]) -> dict:
    """What the judge saw at a step, and what training saw in the 20 steps around it."""
    near = [row for row in rows if abs(row["step"] - point["step"]) <= 10]
    means = {
        metric: sum(row[metric] for row in near) / len(near)
        for metric in ("loss", "rewards/accuracies", "rewards/margins")
    }
    return {n: point[n] for n in point if n == "step" or "/" in n} | means


def draw(data, plt):
    """A row per run: four panels over its steps, and where the healthy run, HEALTHY, ended."""
    figure, grid = plt.subplots(2, 4, figsize=(12, 6), sharey="col", layout="constrained")
    for axes, run in zip(grid, RUNS, strict=True):
        course = data[run]["course"]
        steps = [point["step"] for point in course]
        for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
            axis.plot(steps, [point[metric] for point in course], "o-", color=RED, markersize=4)
            end = data["healthy_end"].get(metric.removeprefix("held_out/"))
            if end is not None:
                axis.plot(EPOCH, end, "D", color=BLUE)
                beside = (7, 2) if metric == "held_out/mass" else (3, -14)  # the free side
                beside = (-7, -3) if steps[-1] == EPOCH else beside
                label(axis, EPOCH, end, "β = 1, one epoch", BLUE, beside)
            axis.set(xlabel="step", xlim=(-0.04 * steps[-1], 1.07 * steps[-1]))
            axis.axhline(0, color=GREY, linewidth=0.8)
            if run == "hot":
                axis.set_title(title)
        axes[0].set_ylabel(TITLES[run])
    figure.suptitle("Too hot, too long: training looks fine, the answers do not")
    return figure


if __name__ == "__main__":
    main("overoptimization", __doc__, compute, draw)
