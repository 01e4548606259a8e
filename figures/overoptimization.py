"""Too long, too hot: the loss and the held-out rewards improve while the judge's scores collapse.

    python figures/overoptimization.py [--draw]

The hot run has beta 0.1 and twice the learning rate; the healthy one is that of closed_form.py.
"""

import tuning as t
import world as w
from record import BLUE, GREY, RED, label, main

HOT = t.Recipe(beta=0.1, learning_rate=3e-3, eval_every=19, sample_every=True)
HEALTHY = t.Recipe()
PANELS = {
    "rewards/accuracies": "training: pairs ranked right",
    "held_out/sampled_true_score": "true score of sampled answers",
    "held_out/sampled_share_garbled": "share of answers with nonsense",
    "held_out/mass": "probability of the 15 answers",
}


def compute() -> dict:
    """The course of the hot run: what training sees, and what the judge sees."""
    world = w.open_world()
    result, healthy = t.tune(world, HOT), t.tune(world, HEALTHY)
    course = [{n: p[n] for n in p if n == "step" or "/" in n} for p in result["course"]]
    for point in course:
        # What training saw in the 20 steps around each evaluation.
        near = [row for row in result["rows"] if abs(row["step"] - point["step"]) <= 10]
        for metric in ("loss", "rewards/accuracies", "rewards/margins"):
            point[metric] = sum(row[metric] for row in near) / len(near)
    return {
        "settings": result["recipe"],
        "cpu_seconds": result["cpu_seconds"],
        "course": course,
        "end": result["held_out"],
        "healthy_end": healthy["held_out"],
        "questions": world.held_out[:4],
        "answers": result["samples"][:4],
        "healthy_answers": healthy["samples"][:4],
    }


def draw(data, plt):
    """Four panels over the same steps, and where the healthy run ended."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained")
    steps = [point["step"] for point in data["course"]]
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        axis.plot(steps, [point[metric] for point in data["course"]], "o-", color=RED, markersize=4)
        end = data["healthy_end"].get(metric.removeprefix("held_out/"))
        if end is not None:
            axis.plot(steps[-1], end, "D", color=BLUE)
            label(axis, steps[-1], end, "β = 1", BLUE, (-7, -3))
        axis.set(title=title, xlabel="step", xlim=(-4, 120))
        axis.axhline(0, color=GREY, linewidth=0.8)
    figure.suptitle("Too hot (β = 0.1, twice the rate): training looks fine, the answers do not")
    return figure


if __name__ == "__main__":
    main("overoptimization", __doc__, compute, draw)
