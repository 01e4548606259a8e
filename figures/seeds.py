"""Three seeds: how far the other experiments' numbers go up and down by chance.

    python figures/seeds.py [--draw]

A seed draws the votes, their order and the new adapter's A. Base, SFT and questions stay. Measured
on the 60 new questions, like everything that the tutorial quotes.
"""

from dataclasses import asdict, replace

import closed_form
import length
import noise
import precision
import torch
import tuning as t
import world as w
from record import BLUE, main

SEEDS = (0, 1, 2)
METRICS = {
    "score": "expected true score",
    "kl": "KL to SFT, nats an answer",
    "share_of_gain": "share of the gain that its KL can buy",
}


def recipes() -> dict[str, t.Recipe]:
    """The policies of the other experiments, each under one name."""
    policies = closed_form.recipes()
    policies |= {f"{name} votes": recipe for name, recipe in noise.recipes().items()}
    policies |= length.RUNS
    policies |= {name: precision.RUNS[name] for name in ("LoRA", "full")}
    first = {}
    for name, recipe in policies.items():
        first.setdefault(recipe, name)  # "DPO 1" is the healthy run of them all
    return {name: recipe for recipe, name in first.items()}


def compute() -> dict:
    """Each policy's measurements for each seed, with their mean, least and greatest."""
    world = w.open_world()
    questions = w.asked(world)["held_out"]
    scores = w.stack(world.scores, questions)
    data = {"seeds": list(SEEDS), "cpu_seconds": 0.0}
    for name, recipe in recipes().items():
        ref = w.stack(t.reference_table(world, recipe.precision), questions)
        found = []
        for seed in SEEDS:
            result = t.tune(world, replace(recipe, seed=seed))
            data["cpu_seconds"] += result["cpu_seconds"]
            logps = torch.tensor(result["held_out_logps"], dtype=torch.float64)
            policy = w.exact(logps, ref, scores)
            found.append(policy | {"share_of_gain": w.share_of_gain(policy, ref, scores)})
        data[name] = {"settings": asdict(recipe)} | {m: spread(found, m) for m in METRICS}
    return data


def spread(found: list[dict], metric: str) -> dict:
    """A metric's values in the order of the seeds, and what they come to."""
    values = [policy[metric] for policy in found]
    mean = sum(values) / len(values)
    return {"values": values, "mean": mean, "min": min(values), "max": max(values)}


def draw(data, plt):
    """A row for each policy, a dot for each seed."""
    names = [name for name in data if isinstance(data[name], dict) and "score" in data[name]]
    height = 0.27 * len(names) + 0.9
    figure, axes = plt.subplots(1, 3, figsize=(11, height), sharey=True, layout="constrained")
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for row, name in enumerate(names):
            values = data[name][metric]["values"]
            axis.plot([min(values), max(values)], [row, row], color=BLUE, linewidth=1)
            axis.plot(values, [row] * len(values), "o", color=BLUE, markersize=4)
        axis.set(title=title, yticks=range(len(names)), yticklabels=names)
    axes[0].invert_yaxis()
    figure.suptitle("Each policy with three seeds, on new questions")
    return figure


if __name__ == "__main__":
    main("seeds", __doc__, compute, draw)
