"""What a run shows at its end: base, SFT and DPO side by side, the judge's verdict, and curves."""

import math
from functools import partial
from itertools import islice
from statistics import mean

import torch

from dpo_minimal import forum
from dpo_minimal.data import encode_example
from dpo_minimal.evaluate import kl_estimate
from dpo_minimal.extras import card, digest, plots, trackers
from dpo_minimal.extras.sampling import answer_tokens, ready_to_sample
from dpo_minimal.files import whole_file, write_json
from dpo_minimal.formats.conversations import spoken
from dpo_minimal.generate import AT_A_TIME, make_chooser, sample
from dpo_minimal.lora import active_adapters, adapter_names

GREEDY = 8  # questions that are answered greedily too, to be read
VARIANTS = {"base": [], "SFT": ["sft"], "DPO": ["dpo"]}  # name: active adapters
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


def truth_on_votes(pairs) -> dict[str, float]:
    """What the true scores themselves get on noisy votes: no model can expect to do better.

    accuracy: the share of these votes that the better answer won; a tie is half. loss: the mean of
    -log sigmoid(score difference), equation (4). expected_accuracy, expected_loss: their means if
    these pairs were voted on again and again.
    """
    gaps = [forum.judge(p.prompt, p.chosen) - forum.judge(p.prompt, p.rejected) for p in pairs]
    chances = [1 / (1 + math.exp(-gap)) for gap in gaps]  # of the vote as it went
    entropies = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in chances]
    return {
        "accuracy": mean(0.5 if gap == 0 else float(gap > 0) for gap in gaps),
        "loss": mean(-math.log(p) for p in chances),
        "expected_accuracy": mean(max(p, 1 - p) for p in chances),
        "expected_loss": mean(entropies),
    }


def variants(model) -> dict[str, list[str]]:
    """Those of VARIANTS whose adapters the model has."""
    have = set(adapter_names(model))
    return {name: adapters for name, adapters in VARIANTS.items() if have.issuperset(adapters)}


def compare(model, tokenizer, questions, device, max_new_tokens, seed, judged, log=print):
    """Ask base, SFT and DPO the same questions.

    Returns ({variant: metrics}, {variant: greedy answers to the first questions}). judged: the
    questions are the forum's, so every sampled answer has a true score.
    """
    table, greedy, sampled = {}, {}, {}
    prompts = [encode_example(tokenizer, question)[0] for question in questions]
    reference = [name for name in ["sft"] if name in adapter_names(model)]  # not with --no-sft
    longest, context = max(map(len, prompts)), model.config.max_position_embeddings
    if longest + max_new_tokens > context:
        log(f"warning   a question has {longest} tokens: its answers end at the context, {context}")
    with ready_to_sample(model):  # once for all of them
        for name, adapters in variants(model).items():
            log(f"evaluate  {name} answers {len(questions)} held-out questions")
            with active_adapters(model, adapters):
                ids, first, log_pi = both_answers(model, tokenizer, prompts, max_new_tokens, seed)
                kl = 0.0  # the reference's own: every ratio is 1
                if adapters != reference:
                    kl = kl_estimate(model, reference, prompts, ids, device, known=log_pi)
            sampled[name] = [tokenizer.decode(answer).strip() for answer in ids]
            greedy[name] = [tokenizer.decode(answer).strip() for answer in first]
            table[name] = {"kl_to_sft" if reference else "kl_to_base": kl}
            if judged:
                table[name] |= judge_answers(questions, sampled[name])
    if judged and "SFT" in sampled:  # not with --no-sft
        rate = win_rate(questions, sampled["DPO"], sampled["SFT"])
        table["DPO"]["win_rate_against_sft"] = rate
    return table, greedy


def both_answers(model, tokenizer, prompts, max_new_tokens: int, seed: int):
    """(an answer to each prompt, greedy answers to the first GREEDY ones, log pi of the former).

    Answers are token ids. The same passes give all: a few more rows cost little, since the weights
    are read anyway. log pi: float32 [n], or None for a model in 16 bits. There another pass rounds
    otherwise, and the difference would count as KL.
    """
    rows, draw, answers, log_pi = prompts + prompts[:GREEDY], make_chooser(seed=seed), [], []
    weight = model.lm_head.weight
    wide = weight.dtype == torch.float32
    for at in range(0, len(rows), AT_A_TIME):
        part, drawn = rows[at : at + AT_A_TIME], max(len(prompts) - at, 0)
        logps = []  # of the tokens drawn, [drawn] for each step
        chooser = partial(draw_some, drawn=drawn, draw=draw, logps=logps if wide else None)
        found = sample(model, part, max_new_tokens, tokenizer.eos_id, chooser)
        answers += found
        for i, answer in enumerate(found[:drawn]):
            log_pi.append(sum(step[i] for step in logps[: len(answer)]))
    known = weight.new_tensor(log_pi) if wide else None
    return answers[: len(prompts)], answers[len(prompts) :], known


def draw_some(logits, drawn: int, draw, logps: list | None):
    """The next tokens of rows [B, V]: the first `drawn` ones by draw(logits), the rest greedily.

    Unless `logps` is None, the log-probabilities of those drawn, floats, are put at its end.
    """
    tokens = logits.argmax(dim=-1)  # [B]
    if drawn:
        tokens[:drawn] = draw(logits[:drawn])
    if drawn and logps is not None:
        some = logits[:drawn].log_softmax(dim=-1)
        logps.append(some.gather(1, tokens[:drawn, None])[:, 0].tolist())
    return tokens


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
        blocks.append(f"### {spoken(question)}\n\n{answers}\n")
    return "\n".join(blocks)


def shortened(text: str, lines: int = 4, characters: int = 400) -> str:
    """The beginning of a text: a model that repeats itself must not scroll the table away."""
    beginning = "\n".join(text.splitlines()[:lines])[:characters].rstrip()
    return text if beginning == text.rstrip() else f"{beginning} [...]"


def publish(folder, questions, greedy, table, log=print):
    """Write samples.md, draw curves.png, tell the tracker."""
    with whole_file(folder / "samples.md") as file:
        file.write(format_samples(questions, greedy).encode())
    plots.draw_curves(folder, log)
    trackers.follow(folder / "metrics.jsonl")  # nothing was sent yet if only this stage was due
    asked = [spoken(question) for question in questions]
    trackers.finish(asked, greedy, table)


def describe_pairs(run, texts, pairs, metrics) -> dict:
    """Metrics of pairs, with what says of which pairs they are, and over which base.

    texts: PreferencePairs. pairs: EncodedPairs, those of the texts that fit.
    """
    named = {f"eval_{name}": value for name, value in metrics.items()}
    return named | {
        "pairs": str(run.args.eval_data or run.args.data or "the forum's evaluation part"),
        "of": len(pairs),
        "tokens": sum(len(ids) for pair in pairs for ids in pair),
        "texts_digest": digest.of_pairs(texts),
        "tokens_digest": digest.of_pairs(pairs),
        "base_digest": digest.of_base(run.model_folder),
    }


def ask_held_out(run, model, tokenizer, texts, log=print):
    """(questions, table, greedy): `compare` on the questions of held-out pairs, each one once.

    A question that leaves no room for an answer in the model's context is not asked.
    """
    context = model.config.max_position_embeddings
    questions = dict.fromkeys(pair.prompt for pair in texts)
    fitting = (q for q in questions if len(encode_example(tokenizer, q)[0]) < context)
    questions = list(islice(fitting, 120 if run.on_forum else 16))
    table, greedy = compare(
        model,
        tokenizer,
        questions,
        device=run.device,
        max_new_tokens=answer_tokens(run),
        seed=run.args.seed,
        judged=run.on_forum,
        log=log,
    )
    return questions, table, greedy


def write_results(run, model, tokenizer, texts, held_out, log=print) -> str:
    """Write eval.json, samples.md, curves.png and model cards; show what a run ends with.

    held_out: of `describe_pairs`, for these texts. Returns the model card of merged/.
    """
    questions, table, greedy = ask_held_out(run, model, tokenizer, texts, log)
    table["DPO"]["reward_accuracy"] = held_out["eval_rewards/accuracies"]
    truth = truth_on_votes(texts) if run.on_forum else None
    write_json(run.out / "eval.json", {"table": table, "held_out": held_out, "truth": truth})
    publish(run.out, questions, greedy, table, log)
    log(format_summary(table, held_out, truth, questions, greedy))
    return card.write_cards(run, held_out, format_table(table))


def format_summary(table, held_out, truth, questions, greedy) -> str:
    """What a run prints at its end: the table, the held-out accuracy, three questions answered."""
    text = f"held-out pairs ({held_out['of']} of {held_out['pairs']}): "
    text += f"reward accuracy {held_out['eval_rewards/accuracies']:.3f}"
    text += f", margin {held_out['eval_rewards/margins']:+.3f}, loss {held_out['eval_loss']:.4f}"
    if truth is not None:
        text += "\nOn these noisy votes the true scores themselves get "
        text += f"accuracy {truth['accuracy']:.3f}, loss {truth['loss']:.4f}."
    three = {name: [shortened(text) for text in texts[:3]] for name, texts in greedy.items()}
    return f"\n{format_table(table)}\n\n{text}\n\n{format_samples(questions, three)}"
