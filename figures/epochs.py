"""A policy trained by DPO on given votes and looked at after each epoch; each result is kept.

What dose.py, manners.py and votes.py share. A Case is all that a policy depends on. Its
measurements are in runs/figures/NAME/HASH/result.json, so an interrupted experiment goes on with
the policies that are missing. Delete that folder after changing the code.
"""

import torch
import tuning as t
import world as w
from drawing import rounded

from dpo_minimal.evaluate import one_epoch
from dpo_minimal.extras.reading import read_json
from dpo_minimal.files import write_json
from dpo_minimal.loop import Settings
from dpo_minimal.reference import pair_logps

BATCH = 16


def kept(name: str, case, work) -> dict:
    """work(case, folder), a dictionary, unless its result is in the folder already."""
    folder = w.case_folder(name, case)
    path = folder / "result.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, rounded(work(case, folder)))
    return read_json(path)


def train_policy(world, votes, recipe: t.Recipe, folder, steps, look=None, every=0):
    """The policy after `steps` steps of recipe.batch_size votes, starting from SFT.

    look(model) -> {name: number}, called after each `every` steps and after the last one.
    """
    objective = t.make_objective(world, recipe, votes, t.reference_table(world))
    settings = Settings(
        recipe.learning_rate,
        recipe.batch_size,
        epochs=1e6,
        max_steps=steps,
        eval_every=every,
        eval_at_start=False,
    )
    return t.train_on(world, votes, recipe, objective, settings, folder, evaluate=look)


def vote_logps(model, world, votes) -> torch.Tensor:
    """log pi of winner and loser of each vote, float32 [n, 2], without dropout."""
    pairs = t.encoded(world, votes)
    return pair_logps(model, pairs, one_epoch(pairs, BATCH), "cpu")


def reference_vote_logps(world, votes) -> torch.Tensor:
    """The reference's log-probabilities of winner and loser, float32 [n, 2], from the table."""
    reference = t.reference_table(world)
    return torch.tensor([[reference[q][y] for y in ys] for q, *ys in votes]).float()


def vote_margins(model, world, votes, beta: float) -> torch.Tensor:
    """Each vote's margin beta * delta, float32 [n]: what training calls rewards/margins."""
    ratios = vote_logps(model, world, votes) - reference_vote_logps(world, votes)
    return beta * (ratios[:, 0] - ratios[:, 1])


def exact_and_sampled(model, world, questions) -> dict[str, float]:
    """Score, KL and mass over the 15 answers; and the judge's view of sampled ones."""
    found, _ = t.measure(model, world, questions, t.reference_table(world))
    sampled, _ = t.measure_samples(model, world, questions)
    return found | sampled


def prepare():
    """Make base, SFT and the reference's table once, before processes start that would each."""
    t.reference_table(w.open_world())


# --- over the seeds ---------------------------------------------------------------------------


def spread(seeds: list[dict]) -> dict[str, dict]:
    """{metric: mean, lowest, highest over the seeds}."""
    found = {}
    for metric in seeds[0]:
        values = [values[metric] for values in seeds]
        mean = sum(values) / len(values)
        found[metric] = {"mean": mean, "min": min(values), "max": max(values)}
    return found


def cell(found: dict, form: str) -> str:
    """A mean with the lowest and the highest behind it."""
    mean, low, high = (form.format(found[name]) for name in ("mean", "min", "max"))
    return f"{mean} ({low} to {high})"
