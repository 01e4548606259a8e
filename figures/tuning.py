"""Tune a policy on the votes of the forum by a recipe, and measure the result.

The measurements of every tuned policy are kept in runs/figures/tuned, and all experiments use them
again. So delete runs/figures after changing the code.
"""

import math
import random
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from drawing import rounded
from world import (
    RUN,
    World,
    answer_logps,
    asked,
    case_folder,
    exact,
    on_all_cores,
    open_world,
    stack,
)

from benchmarks.record import TRAIN, read_log, run_script
from dpo_minimal import forum
from dpo_minimal.batches import packed_batch, packed_order, pair_batch, pair_order
from dpo_minimal.checkpoint import load_adapter, load_llama, save_llama
from dpo_minimal.data import EncodedPair, encode_sft, load_splits
from dpo_minimal.evaluate import kl_estimate
from dpo_minimal.extras.reading import read_json
from dpo_minimal.extras.report import judge_answers
from dpo_minimal.files import write_json
from dpo_minimal.generate import sample_answers
from dpo_minimal.loop import Settings, Stage, train
from dpo_minimal.lora import add_adapter, lora_layers
from dpo_minimal.loss import dpo_loss, preference_logps, reward_metrics
from dpo_minimal.tokenizer import load_tokenizer
from train import token_objective

FULL_RATE = 5e-4  # learning rate where all weights are trained, a third of the adapters'
LOGGED = (
    *("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("rewards/accuracies", "logps/chosen", "logps/rejected"),
)


@dataclass(frozen=True)
class Recipe:
    """How one policy is tuned, starting from SFT. Its measurements depend on nothing else."""

    loss: str = "sigmoid"  # dpo_loss's kinds, or "chosen": SFT on the chosen answers only
    beta: float = 1.0
    label_smoothing: float = 0.0
    votes: int = 6  # for each of the 600 training questions
    expected: bool = False  # each pair's expected loss, as if it had been voted on infinitely often
    flipped: float = 0.0  # share of votes that are turned around afterwards
    points_per_word: float = 0.0  # that voters add for length, and the judge does not
    mean: bool = False  # log-probabilities per token: the mean instead of the sum
    precision: str = "qlora"  # or "lora", "full"
    learning_rate: float = 1.5e-3
    batch_size: int = 32
    epochs: float = 1.0
    dropout: float = 0.05
    eval_every: int = 0
    sample_every: bool = False  # whether these evaluations also sample answers
    seed: int = 0


def draw_votes(world: World, recipe: Recipe) -> list[tuple[str, int, int]]:
    """(question, winner, loser) with numbers of answers. Bradley-Terry with `voters_like`."""
    rng = random.Random(f"votes {recipe.seed}")
    votes = []
    for question in world.known * recipe.votes:
        j, k = rng.sample(range(15), 2)
        likes = voters_like(world, question, recipe)
        if rng.random() > 1 / (1 + math.exp(likes[k] - likes[j])):
            j, k = k, j
        votes.append((question, k, j) if rng.random() < recipe.flipped else (question, j, k))
    return votes


def encoded(world: World, votes) -> list[EncodedPair]:
    """Votes (question, winner, loser) as the token ids that training wants."""
    return [
        EncodedPair(world.tokens[q][0], *(world.tokens[q][1 + y] for y in ys)) for q, *ys in votes
    ]


def voters_like(world: World, question: str, recipe: Recipe) -> list[float]:
    """The score of each answer by which the voters choose."""
    scores = world.scores[question].tolist()
    if not recipe.points_per_word:
        return scores
    words = [len(answer.split()) for answer in forum.candidates(question)]
    return [s + recipe.points_per_word * w for s, w in zip(scores, words, strict=True)]


def start_policy(recipe: Recipe):
    """The model after SFT, with a new adapter to train. For "full", all its weights are trained."""
    quantize = "nf4" if recipe.precision == "qlora" else None
    if recipe.precision == "full":
        model = load_llama(full_sft(), quantize=None)
        return model.requires_grad_(True)
    folder = lora_sft() if recipe.precision == "lora" else RUN
    model = load_llama(RUN / "base", quantize=quantize)
    load_adapter(model, folder / "sft", "sft")
    torch.manual_seed(recipe.seed)
    add_adapter(model, "dpo", dropout=recipe.dropout, targets="all")
    return model


def lora_sft() -> Path:
    """The folder of a run whose base is not quantized. Its SFT is made if it is not there."""
    folder = RUN / "lora"
    if not (folder / "sft").exists():
        shutil.rmtree(folder, ignore_errors=True)
        for part in ("base", "data"):
            shutil.copytree(RUN / part, folder / part)
        run_script(TRAIN, "--stage", "sft", "--no-quantize", "--out", folder)
    return folder


def full_sft() -> Path:
    """A model folder in float32: SFT of all weights, with the texts and steps of LoRA's SFT."""
    folder = RUN / "full"
    if not folder.exists():
        model = load_llama(RUN / "base", quantize=None).requires_grad_(True)
        texts = encode_sft(load_tokenizer(RUN / "base"), load_splits(RUN / "data").sft, 128)
        order = packed_order(texts, 128, window=len(texts), seed=0)
        stage = Stage("full", token_objective, order, partial(packed_batch, texts, device="cpu"))
        train(model, stage, Settings(FULL_RATE, batch_size=8, epochs=3), RUN)
        save_llama(model, folder, torch.float32, tokenizer_from=RUN / "base")
    return folder


def reference_table(world: World, precision: str = "qlora") -> dict[str, torch.Tensor]:
    """log pi_ref of all answers to all 720 questions, {question: float64 [Y]}. Kept in a file."""
    path = RUN / ("reference.pt" if precision == "qlora" else f"reference-{precision}.pt")
    questions = [*world.known, *world.held_out]
    if not path.exists():  # the reference: a new adapter changes nothing yet
        model = start_policy(Recipe(precision=precision))
        torch.save(answer_logps(model, world, questions), path)
    return dict(zip(questions, torch.load(path, weights_only=True), strict=True))


def make_objective(world: World, recipe: Recipe, votes, reference):
    """objective(model, batch) for `loop.train`: the recipe's loss of each pair."""
    kind = "sigmoid" if recipe.loss == "chosen" else recipe.loss
    ref_logps = torch.tensor([[reference[q][y] for y in pair] for q, *pair in votes]).float()
    lengths = torch.tensor([[len(world.tokens[q][1 + y]) for y in pair] for q, *pair in votes])
    scores = torch.tensor([[world.scores[q][y] for y in pair] for q, *pair in votes])
    certainty = torch.sigmoid(scores[:, 0] - scores[:, 1]).float()

    def objective(model, batch):
        policy_chosen_logps, policy_rejected_logps = preference_logps(model, batch)  # [B] each
        ref_chosen_logps, ref_rejected_logps = ref_logps[batch.indices].T
        if recipe.mean:
            chosen_length, rejected_length = lengths[batch.indices].T
            policy_chosen_logps = policy_chosen_logps / chosen_length
            policy_rejected_logps = policy_rejected_logps / rejected_length
            ref_chosen_logps = ref_chosen_logps / chosen_length
            ref_rejected_logps = ref_rejected_logps / rejected_length
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            beta=recipe.beta,
            label_smoothing=recipe.label_smoothing,
            kind=kind,
        )
        if recipe.expected:
            p = certainty[batch.indices]
            turned_around, _, _ = dpo_loss(
                policy_chosen_logps=policy_rejected_logps,
                policy_rejected_logps=policy_chosen_logps,
                ref_chosen_logps=ref_rejected_logps,
                ref_rejected_logps=ref_chosen_logps,
                beta=recipe.beta,
                label_smoothing=recipe.label_smoothing,
                kind=kind,
            )
            losses = p * losses + (1 - p) * turned_around
        elif recipe.loss == "chosen":
            losses = -policy_chosen_logps
        return losses, reward_metrics(
            policy_chosen_logps, policy_rejected_logps, chosen_rewards, rejected_rewards
        )

    return objective


def tune(world: World, recipe: Recipe) -> dict:
    """Tune a policy and measure it, or read the measurements if that was done before.

    {"rows": the training log, "course": exact measurements on 20 questions of each kind every
    eval_every steps, "known" and "held_out": the same on 60 questions at the end, and the judge's
    measurements of samples, "known_logps" and "held_out_logps": log pi of the answers,
    "cpu_seconds"}.
    """
    path = result_path(recipe)
    if not path.exists():
        started = time.process_time()
        result = {"recipe": asdict(recipe)} | train_and_measure(world, recipe, path.parent)
        write_json(path, result | {"cpu_seconds": time.process_time() - started})
    return read_json(path)


def result_path(recipe: Recipe) -> Path:
    """Where a policy's measurements are kept."""
    return case_folder("tuned", recipe) / "result.json"


def tune_all(recipes):
    """Tune the policies that are not there yet, on all cores; `tune` then reads their results."""
    missing = [recipe for recipe in recipes if not result_path(recipe).exists()]
    world = open_world()
    for precision in {recipe.precision for recipe in missing}:
        reference_table(world, precision)  # once, before processes start that would each make it
    on_all_cores(tune_alone, missing)


def tune_alone(recipe: Recipe):
    """`tune`, in a process of its own."""
    tune(open_world(), recipe)


def train_on(world: World, votes, recipe: Recipe, objective, settings: Settings, folder, evaluate):
    """The policy after training on votes, from SFT. The last four are those of `loop.train`.

    The recipe gives the seed, the dropout and the precision. The log goes to the folder.
    """
    pairs = encoded(world, votes)
    model = start_policy(recipe)
    order = pair_order(pairs, settings.batch_size, recipe.seed)
    stage = Stage("dpo", objective, order, partial(pair_batch, pairs, device="cpu"), evaluate)
    folder.mkdir(parents=True, exist_ok=True)
    train(model, stage, settings, folder)
    return model


def train_and_measure(world: World, recipe: Recipe, folder: Path) -> dict:
    """See `tune`. The log goes to this folder."""
    reference = reference_table(world, recipe.precision)
    votes = draw_votes(world, recipe)
    settings = Settings(
        recipe.learning_rate,
        recipe.batch_size,
        epochs=recipe.epochs,
        eval_every=recipe.eval_every,
    )
    objective = make_objective(world, recipe, votes, reference)
    evaluate = partial(measure_course, world=world, recipe=recipe, reference=reference)
    evaluate = evaluate if recipe.eval_every else None
    model = train_on(world, votes, recipe, objective, settings, folder, evaluate=evaluate)
    steps, evaluations = read_log(folder / "metrics.jsonl")["dpo"]
    rows = [{name: row[name] for name in ("step", *LOGGED)} for row in steps]
    return {"rows": rows, "course": evaluations} | measure_all(model, world, reference)


def measure_course(model, world: World, recipe: Recipe, reference) -> dict[str, float]:
    """The measurements during training, {"known/score": ...}, on 20 questions of each kind."""
    found = {}
    for kind, questions in asked(world).items():
        values = measure(model, world, questions[:20], reference)[0]
        if recipe.sample_every and kind == "held_out":
            values |= measure_samples(model, world, questions)[0]
        found |= {f"{kind}/{name}": value for name, value in values.items()}
    return found


def measure(model, world: World, questions, reference) -> tuple[dict, torch.Tensor]:
    """`exact` for these questions, and the log-probabilities [Q, Y] that it comes from."""
    logps = answer_logps(model, world, questions)
    ref_logps = stack(reference, questions)
    return exact(logps, ref_logps, stack(world.scores, questions)), logps


def measure_all(model, world: World, reference) -> dict:
    """The measurements at the end of tuning, on held-out questions also of sampled answers."""
    result = {}
    for kind, questions in asked(world).items():
        result[kind], logps = measure(model, world, questions, reference)
        result[f"{kind}_logps"] = rounded(logps.tolist())
    sampled, texts = measure_samples(model, world, asked(world)["held_out"])
    result["held_out"] |= sampled
    return result | {"samples": texts[:8]}


def measure_samples(model, world: World, questions) -> tuple[dict, list[str]]:
    """What the judge says about sampled answers, their KL (a full-text estimate), the answers."""
    ids = sample_answers(model, world.tokenizer, questions, 64, seed=0)
    return judge_samples(model, world, questions, ids)


def judge_samples(model, world: World, questions, ids) -> tuple[dict, list[str]]:
    """See `measure_samples`; ids: the tokens of the policy's own answers to the questions."""
    found = {}
    if lora_layers(model):
        prompts = [world.tokens[question][0] for question in questions]
        found["kl"] = kl_estimate(model, ["sft"], prompts, ids, "cpu")
    texts = [world.tokenizer.decode(answer).strip() for answer in ids]
    found |= judge_answers(questions, texts)
    found["words"] = sum(len(text.split()) for text in texts) / len(texts)
    return {f"sampled_{name}": value for name, value in found.items()}, texts


def final_logps(result: dict, kind: str) -> torch.Tensor:
    """log pi of the answers after tuning, from a result of `tune`: float64 [Q, Y]."""
    return torch.tensor(result[f"{kind}_logps"], dtype=torch.float64)
