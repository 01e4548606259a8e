"""A policy trained by DPO on given votes and looked at after each epoch; each result is kept.

What dose.py, manners.py and votes.py share. A Case is all that a policy depends on. Its
measurements are in runs/figures/NAME/HASH/result.json, so an interrupted experiment goes on with
the policies that are missing. Delete that folder after changing the code.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

import torch
import tuning as t
import world as w
from drawing import RESULTS, draw_result, rounded

from benchmarks.record import machine_record, script_parser, write_result
from dpo_minimal.batches import pair_batch, pair_order
from dpo_minimal.data import EncodedPair
from dpo_minimal.evaluate import one_epoch
from dpo_minimal.extras.reading import read_json
from dpo_minimal.files import write_json
from dpo_minimal.loop import Settings, Stage, train
from dpo_minimal.reference import pair_logps

BATCH = 16


def case_folder(name: str, case) -> Path:
    """Where a policy's log and measurements are. The case is a frozen dataclass."""
    return w.RUN / name / hashlib.sha256(repr(case).encode()).hexdigest()[:16]


def kept(name: str, case, work) -> dict:
    """work(case, folder), a dictionary, unless its result is in the folder already."""
    folder = case_folder(name, case)
    path = folder / "result.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, rounded(work(case, folder)))
    return read_json(path)


def encoded(world, votes) -> list[EncodedPair]:
    """Votes (question, winner, loser) as the token ids that training wants."""
    return [
        EncodedPair(world.tokens[q][0], *(world.tokens[q][1 + y] for y in ys)) for q, *ys in votes
    ]


def train_policy(world, votes, recipe: t.Recipe, folder, steps, look=None, every=0):
    """The policy after `steps` steps of recipe.batch_size votes, starting from SFT.

    look(model) -> {name: number}, called after each `every` steps and after the last one.
    """
    pairs = encoded(world, votes)
    model = t.start_policy(recipe)
    objective = t.make_objective(world, recipe, votes, t.reference_table(world))
    order = pair_order(pairs, recipe.batch_size, recipe.seed)
    stage = Stage("dpo", objective, order, partial(pair_batch, pairs, device="cpu"), look)
    settings = Settings(
        recipe.learning_rate,
        recipe.batch_size,
        epochs=1e6,
        max_steps=steps,
        eval_every=every,
        eval_at_start=False,
    )
    train(model, stage, settings, folder)
    return model


def vote_logps(model, world, votes) -> torch.Tensor:
    """log pi of winner and loser of each vote, float32 [n, 2], without dropout."""
    pairs = encoded(world, votes)
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


def main(name: str, description: str, compute, show, draw):
    """Write figures/results/NAME.json from compute(quick=False) and draw figures/NAME.svg.

    --quick prints show(compute(quick=True)) and writes neither. --draw uses the JSON that is there.
    """
    parser = script_parser(description)
    parser.add_argument("--draw", action="store_true", help="only draw the existing JSON file")
    parser.add_argument("--quick", action="store_true", help="a tiny version of it, no figure")
    args = parser.parse_args()
    path = RESULTS / f"{name}.json"
    if args.quick:
        print(show(compute(quick=True)))
        return
    if not args.draw:
        write_result(path, rounded({"made": machine_record()} | compute(quick=False)))
    print(show(json.loads(path.read_text("utf-8"))))
    draw_result(path, draw)
