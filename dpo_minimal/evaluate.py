"""What tuning changed: held-out rewards, KL to the reference, true scores, win rate, samples."""

import itertools
import json
import math
from pathlib import Path
from statistics import mean

import torch

from dpo_minimal import forum
from dpo_minimal.batches import answer_rows, joined, pair_batch, pair_batches
from dpo_minimal.data import format_prompt
from dpo_minimal.generate import sample_answers
from dpo_minimal.lora import active_adapters
from dpo_minimal.loss import dpo_loss, preference_logps, reward_metrics, sequence_logps


@torch.no_grad()
def batch_logps(model, batch) -> torch.Tensor:
    """log pi of both answers of each pair of a batch, float32 [B, 2], on the CPU.

    Dropout is off and the random state stays.
    """
    training = model.training
    model.eval()
    logps = torch.stack(preference_logps(model, batch), dim=1)
    model.train(training)
    return logps.float().cpu()


def pair_logps(model, pairs, order, device, of_batch=None) -> torch.Tensor:
    """log pi of both answers of each pair, float32 [n, 2]: chosen, rejected. NaN if not in order.

    order: lists of indices, one a forward pass. of_batch: another function than `batch_logps`.
    """
    of_batch = of_batch or batch_logps
    logps = torch.full((len(pairs), 2), torch.nan)
    for indices in order:
        logps[indices] = of_batch(model, pair_batch(pairs, indices, device))
    return logps


def one_epoch(pairs, batch_size: int, seed: int = 0) -> list[list[int]]:
    """The batches of the first epoch, as lists of indices."""
    batches = pair_batches(pairs, batch_size, seed)
    first = itertools.islice(batches, batches.num_batches())
    return [list(joined(rows)) for rows in first]


def preference_metrics(policy, reference, **options) -> dict[str, float]:
    """Mean DPO loss and reward metrics of pairs, from log-probabilities [n, 2] of both models."""
    losses, chosen, rejected = dpo_loss(*policy.T, *reference.T, **options)
    metrics = {"loss": losses} | reward_metrics(*policy.T, chosen, rejected)
    return {name: float(values.mean()) for name, values in metrics.items()}


@torch.no_grad()
def kl_estimate(model, reference, prompts, answers, device, batch_size=16) -> float:
    """KL(policy || reference) in nats an answer: the mean of log pi - log ref over pi's samples.

    The policy is the model as it is, the reference the one with only the adapters `reference`.
    prompts, answers: token ids, the answers sampled from the policy at temperature 1.
    """
    ratios = []
    for at in range(0, len(prompts), batch_size):
        span = slice(at, at + batch_size)
        rows = answer_rows(list(zip(prompts[span], answers[span], strict=True)), device)
        log_pi = sequence_logps(model, *rows)
        with active_adapters(model, reference):
            log_ref = sequence_logps(model, *rows)
        ratios += (log_pi - log_ref).tolist()
    return mean(ratios)


def judge_answers(questions, answers) -> dict[str, float]:
    """The forum judge's means over answers, as text."""
    grades = [forum.grade(*pair) for pair in zip(questions, answers, strict=True)]
    return {
        "true_score": mean(map(forum.judge, questions, answers)),
        "share_right": mean(grade.right for grade in grades),
        "share_polite": mean(grade.polite for grade in grades),
        "share_garbled": mean(grade.garbled > 0 for grade in grades),
    }


def win_rate(questions, ours, theirs) -> float:
    """The share of questions where the judge prefers our answer; a tie is half a win."""
    scores = zip(
        map(forum.judge, questions, ours), map(forum.judge, questions, theirs), strict=True
    )
    return mean(0.5 * ((a > b) + (a >= b)) for a, b in scores)


def vote_bound(pairs) -> float:
    """The accuracy of the truth itself on noisy votes: the mean of sigmoid(|score difference|)."""
    gaps = [forum.judge(p.prompt, p.chosen) - forum.judge(p.prompt, p.rejected) for p in pairs]
    return mean(1 / (1 + math.exp(-abs(gap))) for gap in gaps)


VARIANTS = {"base": [], "SFT": ["sft"], "DPO": ["dpo"]}  # name: active adapters


def compare(model, tokenizer, questions, device, max_new_tokens, seed, judged, log=print):
    """Ask base, SFT and DPO the same questions.

    Returns ({variant: metrics}, {variant: greedy answers to the first 8 questions}). `judged`: the
    questions are the forum's, so every sampled answer has a true score.
    """
    table, greedy, sampled = {}, {}, {}
    prompts = [tokenizer.encode(format_prompt(question), bos=True) for question in questions]
    for name, adapters in VARIANTS.items():
        log(f"evaluate  {name} answers {len(questions)} held-out questions")
        with active_adapters(model, adapters):
            ids = sample_answers(model, tokenizer, questions, max_new_tokens, seed=seed)
            first = sample_answers(model, tokenizer, questions[:8], max_new_tokens, temperature=0)
            kl = kl_estimate(model, ["sft"], prompts, ids, device)
        sampled[name] = [tokenizer.decode(answer).strip() for answer in ids]
        greedy[name] = [tokenizer.decode(answer).strip() for answer in first]
        table[name] = {"kl_to_sft": kl}
        if judged:
            table[name] |= judge_answers(questions, sampled[name])
    if judged:
        rate = win_rate(questions, sampled["DPO"], sampled["SFT"])
        table["DPO"]["win_rate_against_sft"] = rate
    return table, greedy


COLUMNS = {
    "true_score": ("true score", "{:+.2f}"),
    "share_right": ("right", "{:.0%}"),
    "share_polite": ("polite", "{:.0%}"),
    "share_garbled": ("garbled", "{:.0%}"),
    "win_rate_against_sft": ("wins against SFT", "{:.0%}"),
    "kl_to_sft": ("KL to SFT", "{:.2f}"),
    "reward_accuracy": ("reward accuracy", "{:.3f}"),
}


def format_table(table: dict) -> str:
    """The variants' metrics as a Markdown table."""
    present = [name for name in COLUMNS if any(name in row for row in table.values())]
    lines = ["| model | " + " | ".join(COLUMNS[name][0] for name in present) + " |"]
    lines.append("|---" * (len(present) + 1) + "|")
    for variant, row in table.items():
        cells = ["-" if row.get(n) is None else COLUMNS[n][1].format(row[n]) for n in present]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_samples(questions, greedy: dict) -> str:
    """Questions with every variant's greedy answer, as Markdown."""
    blocks = []
    for i, question in enumerate(questions[: len(next(iter(greedy.values())))]):
        # Further lines of an answer are indented, to stay within its list item.
        texts = {name: answers[i].replace("\n", "\n  ") for name, answers in greedy.items()}
        answers = "\n".join(f"- **{name}**: {text}" for name, text in texts.items())
        blocks.append(f"### {question}\n\n{answers}\n")
    return "\n".join(blocks)


def last_evaluation(path) -> dict[str, float]:
    """The metrics of the last evaluation on held-out pairs in a metrics.jsonl."""
    lines = Path(path).read_text("utf-8").splitlines()
    last = json.loads([line for line in lines if '"eval_loss"' in line][-1])
    return {name: value for name, value in last.items() if name.startswith("eval_")}


def format_summary(table, held_out, bound, questions, greedy) -> str:
    """What a run prints at its end: the table, the held-out accuracy, three questions answered."""
    text = f"held-out pairs: reward accuracy {held_out['eval_rewards/accuracies']:.3f}"
    if bound is not None:
        text += f" (the truth itself agrees with {bound:.3f} of the noisy votes)"
    text += f", margin {held_out['eval_rewards/margins']:+.3f}, loss {held_out['eval_loss']:.4f}"
    three = {name: answers[:3] for name, answers in greedy.items()}
    return f"\n{format_table(table)}\n\n{text}\n\n{format_samples(questions, three)}"
