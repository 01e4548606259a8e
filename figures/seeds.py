"""Three seeds: how much the numbers of the other experiments vary by chance.

    python figures/seeds.py [--draw]

A seed decides the votes, their order and A of the new adapter. Base, SFT and questions stay the
same. All is measured on the 60 new questions, like everything that the tutorial quotes.
"""

from dataclasses import asdict, replace

import closed_form
import epochs as e
import length
import noise
import precision
import tuning as t
import world as w
from drawing import BLUE, main

SEEDS = (0, 1, 2)
METRICS = {
    "score": "score, over the 15",
    "sampled_true_score": "score as it speaks",
    "kl": "KL, over the 15",
    "share_of_gain": "share of the gain",
    "sampled_share_garbled": "garbled",
}


def recipes() -> dict[str, t.Recipe]:
    """The policies of the other experiments, each of them once."""
    policies = closed_form.recipes()
    policies |= {f"{name} votes": recipe for name, recipe in noise.recipes().items()}
    policies |= length.RUNS
    policies |= {name: precision.RUNS[name] for name in ("LoRA", "full")}
    first = {}
    for name, recipe in policies.items():
        first.setdefault(recipe, name)  # the healthy run of all experiments is "DPO 1"
    return {name: recipe for recipe, name in first.items()}


def compute() -> dict:
    """The measurements of each policy for each seed, with their mean, minimum and maximum."""
    world = w.open_world()
    questions = w.asked(world)["held_out"]
    scores = w.stack(world.scores, questions)
    data = {"seeds": list(SEEDS), "cpu_seconds": 0.0}
    t.tune_all(replace(recipe, seed=seed) for recipe in recipes().values() for seed in SEEDS)
    for name, recipe in recipes().items():
        ref = w.stack(t.reference_table(world, recipe.precision), questions)
        found = []
        for seed in SEEDS:
            result = t.tune(world, replace(recipe, seed=seed))
            data["cpu_seconds"] += result["cpu_seconds"]
            exact = w.exact_with_share(t.final_logps(result, "held_out"), ref, scores)
            found.append({m: (result["held_out"] | exact)[m] for m in METRICS})
        over_seeds = e.spread(found)
        data[name] = {"settings": asdict(recipe)} | {
            m: {"values": [policy[m] for policy in found]} | over_seeds[m] for m in METRICS
        }
    return data


def draw(data, plt):
    """A row per policy, a dot per seed."""
    names = [name for name in data if isinstance(data[name], dict) and "score" in data[name]]
    height = 0.27 * len(names) + 0.9
    size = (11, height)
    figure, axes = plt.subplots(1, len(METRICS), figsize=size, sharey=True, layout="constrained")
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
