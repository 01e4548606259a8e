"""What a run shows at its end: base, SFT and DPO side by side, the judge's verdict, and curves."""

import json
import math
from pathlib import Path
from statistics import mean

from dpo_minimal import InputError, forum
from dpo_minimal.data import format_prompt
from dpo_minimal.evaluate import kl_estimate
from dpo_minimal.generate import sample_answers
from dpo_minimal.lora import active_adapters, adapter_names

VARIANTS = {"base": [], "SFT": ["sft"], "DPO": ["dpo"]}  # name: active adapters
REWARDS = [["rewards/chosen", "rewards/rejected"], ["rewards/margins"], ["rewards/accuracies"]]
COLUMNS = {
    "true_score": ("true score", "{:+.2f}"),
    "share_right": ("right", "{:.0%}"),
    "share_polite": ("polite", "{:.0%}"),
    "share_garbled": ("garbled", "{:.0%}"),
    "win_rate_against_sft": ("wins against SFT", "{:.0%}"),
    "kl_to_sft": ("KL to SFT", "{:.2f}"),
    "kl_to_base": ("KL to base", "{:.2f}"),
    "reward_accuracy": ("reward accuracy", "{:.3f}"),
}


def judge_answers(questions, answers) -> dict[str, float]:
    """The forum judge's means over answers to questions, both as text."""
    grades = [forum.grade(q, answer) for q, answer in zip(questions, answers, strict=True)]
    return {
        "true_score": mean(map(forum.judge, questions, answers)),
        "share_right": mean(grade.right for grade in grades),
        "share_polite": mean(grade.polite for grade in grades),
        "share_garbled": mean(grade.garbled > 0 for grade in grades),
    }


def win_rate(questions, ours, theirs) -> float:
    """The share of questions where the judge prefers our answer; a tie is half a win."""
    wins = []
    for question, our, their in zip(questions, ours, theirs, strict=True):
        difference = forum.judge(question, our) - forum.judge(question, their)
        wins.append(0.5 if difference == 0 else float(difference > 0))
    return mean(wins)


def vote_bound(pairs) -> float:
    """The accuracy of the truth itself on noisy votes: the mean of sigmoid(|score difference|)."""
    gaps = [forum.judge(p.prompt, p.chosen) - forum.judge(p.prompt, p.rejected) for p in pairs]
    return mean(1 / (1 + math.exp(-abs(gap))) for gap in gaps)


def variants(model) -> dict[str, list[str]]:
    """Those of VARIANTS whose adapters the model has."""
    have = set(adapter_names(model))
    return {name: adapters for name, adapters in VARIANTS.items() if have.issuperset(adapters)}


def compare(model, tokenizer, questions, device, max_new_tokens, seed, judged, log=print):
    """Ask base, SFT and DPO the same questions.

    Returns ({variant: metrics}, {variant: greedy answers to the first 8 questions}). judged: the
    questions are the forum's, so every sampled answer has a true score.
    """
    table, greedy, sampled = {}, {}, {}
    prompts = [tokenizer.encode(format_prompt(question), bos=True) for question in questions]
    reference = [name for name in ["sft"] if name in adapter_names(model)]  # not with --no-sft
    for name, adapters in variants(model).items():
        log(f"evaluate  {name} answers {len(questions)} held-out questions")
        with active_adapters(model, adapters):
            ids = sample_answers(model, tokenizer, questions, max_new_tokens, seed=seed)
            first = sample_answers(model, tokenizer, questions[:8], max_new_tokens, temperature=0)
            kl = kl_estimate(model, reference, prompts, ids, device)
        sampled[name] = [tokenizer.decode(answer).strip() for answer in ids]
        greedy[name] = [tokenizer.decode(answer).strip() for answer in first]
        table[name] = {"kl_to_sft" if reference else "kl_to_base": kl}
        if judged:
            table[name] |= judge_answers(questions, sampled[name])
    if judged:
        rate = win_rate(questions, sampled["DPO"], sampled["SFT"])
        table["DPO"]["win_rate_against_sft"] = rate
    return table, greedy


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
    lines = Path(path).read_text("utf-8", "replace").splitlines() if Path(path).exists() else []
    found = [line for line in lines if '"eval_loss"' in line]
    if not found:
        raise InputError(f"{path}: has no evaluation of DPO any more: run that stage again")
    last = json.loads(found[-1])
    return {name: value for name, value in last.items() if name.startswith("eval_")}


def format_summary(table, held_out, bound, questions, greedy) -> str:
    """What a run prints at its end: the table, the held-out accuracy, three questions answered."""
    text = f"held-out pairs: reward accuracy {held_out['eval_rewards/accuracies']:.3f}"
    if bound is not None:
        text += f" (the truth itself agrees with {bound:.3f} of the noisy votes)"
    text += f", margin {held_out['eval_rewards/margins']:+.3f}, loss {held_out['eval_loss']:.4f}"
    three = {name: answers[:3] for name, answers in greedy.items()}
    return f"\n{format_table(table)}\n\n{text}\n\n{format_samples(questions, three)}"


def draw_curves(metrics, picture, log=print):
    """Draw a metrics.jsonl as a picture: the loss of every stage, then the rewards of DPO."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        log("curves    not drawn: pip install matplotlib for curves.png")
        return
    rows = [json.loads(line) for line in Path(metrics).read_text("utf-8").splitlines()]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    panels = [(stage, ["loss"]) for stage in stages] + [("dpo", names) for names in REWARDS]
    figure, axes = plt.subplots(math.ceil(len(panels) / 3), 3, figsize=(13, 7), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (stage, names) in zip(axes.flat, panels, strict=False):
        draw_panel(axis, [row for row in rows if row["stage"] == stage], names)
        axis.set_title(f"{stage}: {', '.join(names)}")
    figure.tight_layout()
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def draw_panel(axis, rows, names):
    """Each metric as a line over the steps, its held-out values as points of the same colour."""
    for number, name in enumerate(names):
        for prefix, style in (("", "-"), ("eval_", "o")):
            points = [(row["step"], row[prefix + name]) for row in rows if prefix + name in row]
            if points:
                label = f"{name.split('/')[-1]}{', held out' if prefix else ''}"
                edge = {"markeredgecolor": "black"} if prefix else {"linewidth": 1}
                axis.plot(
                    *zip(*points, strict=True), style, color=f"C{number}", label=label, **edge
                )
    axis.set_xlabel("step")
    axis.legend(frameon=False)
