"""The forum as a laboratory: the exact probability of every answer, and sums over them.

A question has 15 answers. So pi_ref, the optimum, a tuned policy and the KL between them are exact
sums over 15 numbers. The base model and SFT are made once, by train.py, in runs/figures.

Shapes: Q questions, Y = 15 answers to each.
"""

import hashlib
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the root, for the imports below

from benchmarks.record import TRAIN, run_script
from dpo_minimal import forum
from dpo_minimal.batches import answer_rows
from dpo_minimal.data import encode_example
from dpo_minimal.loss import sequence_logps
from dpo_minimal.tokenizer import load_tokenizer

RUN = TRAIN.parent / "runs" / "figures"


@dataclass(frozen=True)
class World:
    """Questions, their 15 answers in tokens, and the scores that the judge gives them."""

    tokenizer: object
    known: list[str]  # 600 questions that votes are about
    held_out: list[str]  # 120 that no training text contains
    tokens: dict[str, tuple]  # question: prompt ids, then the ids of each answer
    scores: dict[str, torch.Tensor]  # question: true scores, float64 [Y]


@cache
def open_world() -> World:
    """The world of seed 0. Its base model and SFT are made by train.py if they are not there."""
    for stage, product in (("pretrain", "base"), ("sft", "sft")):
        if not (RUN / product).exists():
            run_script(TRAIN, "--stage", stage, "--out", RUN)
    tokenizer = load_tokenizer(RUN / "base")
    parts = forum.make_forum(0)
    tokens, scores = {}, {}
    for question in forum.QUESTIONS:
        answers = forum.candidates(question)
        tokens[question] = encode_example(tokenizer, question, *answers)
        judged = [forum.judge(question, answer) for answer in answers]
        scores[question] = torch.tensor(judged, dtype=torch.float64)
    known, held_out = (
        list(dict.fromkeys(row["question"] for row in parts[part])) for part in ("rl", "evaluation")
    )
    return World(tokenizer, known, held_out, tokens, scores)


def case_folder(name: str, case) -> Path:
    """Where a policy's log and measurements are. The case is a frozen dataclass."""
    return RUN / name / hashlib.sha256(repr(case).encode()).hexdigest()[:16]


def on_all_cores(work, cases) -> list:
    """[work(case) of each case], from as many processes as there are cores, one thread in each."""
    started = ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), torch.set_num_threads, initargs=(1,)
    )
    results = []
    with started as pool:
        for result in pool.map(work, cases):
            results.append(result)
            print(f"measured  {len(results)} of {len(cases)}", flush=True)
    return results


def asked(world: World) -> dict[str, list[str]]:
    """The questions for measurements: 60 that votes were about, and 60 new ones."""
    return {"known": world.known[:60], "held_out": world.held_out[:60]}


def stack(table: dict[str, torch.Tensor], questions) -> torch.Tensor:
    """The rows of a table for these questions, [Q, Y]."""
    return torch.stack([table[question] for question in questions])


# --- exact sums over the answers --------------------------------------------------------------


@torch.no_grad()
def answer_logps(model, world: World, questions) -> torch.Tensor:
    """log pi(y|x) of all answers to the questions, with their EOS: float64 [Q, Y]."""
    training = model.training
    model.eval()
    logps = []
    for question in questions:
        prompt, *answers = world.tokens[question]
        tokens, loss_mask = answer_rows([(prompt, answer) for answer in answers], "cpu")
        logps.append(sequence_logps(model, tokens, loss_mask))
    model.train(training)
    return torch.stack(logps).double()


def optimum(ref_logps, rewards, beta: float) -> torch.Tensor:
    """log pi*(y|x) with pi* = pi_ref exp(r / beta) / Z over the answers: [Q, Y]."""
    return (ref_logps + rewards / beta).log_softmax(dim=1)


def exact(logps, ref_logps, scores) -> dict[str, float]:
    """Means over questions. For all but `mass` the policies are renormalized on the 15 answers.

    mass: probability of the 15 together. score: expected true score. kl: KL to the reference.
    """
    pi, ref = logps.log_softmax(dim=1), ref_logps.log_softmax(dim=1)
    return {
        "score": float((pi.exp() * scores).sum(dim=1).mean()),
        "kl": float((pi.exp() * (pi - ref)).sum(dim=1).mean()),
        "mass": float(logps.exp().sum(dim=1).mean()),
    }


def win_rates(scores) -> torch.Tensor:
    """P(y beats y'), Bradley-Terry with the true scores: [Q, Y, Y]."""
    return torch.sigmoid(scores[:, :, None] - scores[:, None, :])


def vote_weights(scores) -> tuple[torch.Tensor, torch.Tensor]:
    """P(y is chosen) and P(y is rejected) in the vote on a random pair: [Q, Y] each."""
    wins = win_rates(scores) * (1 - torch.eye(scores.shape[1]))
    pairs = scores.shape[1] * (scores.shape[1] - 1) / 2
    return wins.sum(dim=2) / pairs, wins.sum(dim=1) / pairs


def best_score(ref_logps, scores, kl: float) -> float:
    """The highest expected score of any policy on the answers with this mean KL.

    It is that of an optimum pi*. KL falls as beta rises, so bisection finds its beta.
    """
    low, high = math.log(1e-2), math.log(1e4)
    for _ in range(60):
        middle = (low + high) / 2
        found = exact(optimum(ref_logps, scores, math.exp(middle)), ref_logps, scores)
        low, high = (middle, high) if found["kl"] > kl else (low, middle)
    return found["score"]


def frontier(ref_logps, scores, betas) -> list[dict]:
    """`exact` of the optimum at each beta: the highest score for its KL."""
    return [
        exact(optimum(ref_logps, scores, beta), ref_logps, scores) | {"beta": beta}
        for beta in betas
    ]


def share_of_gain(found: dict, ref_logps, scores) -> float:
    """(score - the reference's) / (the best score at the same KL - the reference's)."""
    start = exact(ref_logps, ref_logps, scores)["score"]
    return (found["score"] - start) / (best_score(ref_logps, scores, found["kl"]) - start)


def exact_with_share(logps, ref_logps, scores) -> dict[str, float]:
    """`exact`, and unless the policy is the reference itself, `share_of_gain`."""
    found = exact(logps, ref_logps, scores)
    if found["kl"] > 1e-6:
        found["share_of_gain"] = share_of_gain(found, ref_logps, scores)
    return found
