"""Preference tuning of a Llama, from files to adapters: SFT and DPO with QLoRA, and an evaluation.

    python train.py                            the embedded forum, from nothing, on a laptop
    python train.py --model DIR --data PATH    a real checkpoint and a preference file

The stages, in order: pretrain (only without --model), sft, dpo, evaluate. Read `main` first.
"""

import json
import tempfile
from functools import partial

import torch

from dpo_minimal import forum, parallel, run_command
from dpo_minimal.batches import collate_packed, collate_pairs, packed_batches, pair_batches
from dpo_minimal.checkpoint import load_adapter, load_llama, read_config, save_adapter, save_llama
from dpo_minimal.data import encode_pairs, encode_sft, keep_fitting, load_splits, read_rows
from dpo_minimal.evaluate import (
    compare,
    format_samples,
    format_summary,
    last_evaluation,
    one_epoch,
    pair_logps,
    preference_metrics,
    vote_bound,
)
from dpo_minimal.extras.plots import draw_curves
from dpo_minimal.files import whole_file, whole_folder, write_json
from dpo_minimal.llama import Llama, LlamaConfig
from dpo_minimal.loop import peak_memory_gb
from dpo_minimal.lora import active_adapters, add_adapter
from dpo_minimal.loss import dpo_loss, preference_logps, reward_metrics, sft_loss
from dpo_minimal.reference import open_reference
from dpo_minimal.run import Run, read_run
from dpo_minimal.tokenizer import load_tokenizer, train_tokenizer

TINY_LLAMA = LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
# So that transformers reads the tokenizer of base/ and merged/ as it reads Llama 2's.
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    **{"add_bos_token": True, "add_eos_token": False},
}


def main():
    """Read and check everything, then the stages in order: each saves what the next one reads."""
    run = read_run(__doc__)
    check_targets(run)
    if run.on_forum:
        run.start()
        if parallel.first() and not (run.out / "data").exists():
            make_forum_data(run)
        parallel.wait()
    if run.due("pretrain"):
        pretrain(run)
    if not any(map(run.due, ("sft", "dpo", "evaluate"))):
        return
    args, max_length = run.args, run.args.max_length
    tokenizer = load_tokenizer(run.model_folder)
    data = args.data or run.out / "data"
    splits = load_splits(data, args.eval_data, args.seed, tell, run.scratch)
    examples = encode_sft(tokenizer, splits.sft, max_length, tell)
    pairs = encode_pairs(tokenizer, splits.train, max_length, "training pairs", tell)
    # As a list, and so tokenized once: every evaluation needs all of them.
    held_out = encode_pairs(tokenizer, list(splits.evaluation), max_length, "held-out pairs", tell)
    quantize = None if args.no_quantize else "nf4"
    model = load_llama(run.model_folder, run.device, run.dtype, quantize)
    kind = f"{quantize or 'not quantized'}, {str(run.dtype)[6:]} on {run.device}"
    tell(f"model     {run.model_folder}, {kind}, peak memory {peak_memory_gb():.2f} GB so far")
    run.start()
    if run.due("sft"):
        sft(run, model, examples)
    if run.due("dpo"):
        load_adapter(model, run.out / "sft", "sft")  # what was saved is what goes on
        dpo(run, model, splits, pairs, held_out)
    parallel.leave()
    if run.due("evaluate"):
        load_adapter(model, run.out / "sft", "sft")
        load_adapter(model, run.out / "dpo", "dpo")  # sft and dpo as one, as exported
        evaluate(run, model, tokenizer, splits.evaluation)
    tell(f"done      {run.out}, peak memory {peak_memory_gb():.2f} GB")


def tell(text: str):
    """A line of progress."""
    if parallel.first():
        print(text, flush=True)


def check_targets(run: Run):
    """InputError for an unknown --target-modules, before any work is done."""
    config = read_config(run.args.model) if run.args.model else TINY_LLAMA
    with torch.device("meta"):
        add_adapter(Llama(config), "trial", targets=run.args.target_modules)


def make_forum_data(run: Run):
    """Write the forum's rows as files: data/pretrain, data/finetune, data/rl, data/evaluation."""
    with whole_folder(run.out / "data") as folder:
        for part, rows in forum.make_forum(run.args.seed).items():
            (folder / part).mkdir()
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / part / "forum.jsonl").write_text(lines, "utf-8")


def pretrain(run: Run):
    """Make a tokenizer and a tiny Llama that has read the forum's threads: base/."""
    texts = [row["text"] for _, row in read_rows(run.out / "data" / "pretrain" / "forum.jsonl")]
    torch.manual_seed(run.args.seed)
    model = Llama(TINY_LLAMA).to(run.device)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(texts, TINY_LLAMA.vocab_size, f"{folder}/tokenizer.model")
        write_json(f"{folder}/tokenizer_config.json", TOKENIZER_CONFIG)
        tell(f"tokenizer {tokenizer.vocab_size} pieces from {len(texts)} threads")
        examples = [([tokenizer.bos_id], tokenizer.encode(text, eos=True)) for text in texts]
        max_length = run.args.max_length
        fitting = [e if 1 + len(e[1]) <= max_length else None for e in examples]
        examples = keep_fitting(fitting, max_length, "threads", tell)
        train_packed(run, "pretrain", model, examples)
        run.finish("pretrain", lambda: save_llama(model, run.out / "base", tokenizer_from=folder))


def train_packed(run: Run, stage: str, model, examples):
    """Pretraining and SFT: train on (unscored ids, scored ids) examples, packed into full rows."""
    max_length = run.args.max_length
    batches = packed_batches(examples, max_length, run.args.seed)
    texts = f"{len(examples)} texts in {batches.num_rows()} rows"
    tell(f"{stage:9} {texts} of up to {max_length} tokens")
    collate = partial(collate_packed, device=run.device)
    run.train(stage, model, token_objective, batches, collate)


def token_objective(model, batch):
    """Pretraining and SFT: the cross-entropy of each scored token."""
    return sft_loss(model, batch.tokens, batch.loss_mask, batch.positions, batch.mask), {}


def sft(run: Run, model, examples):
    """Train the adapter `sft` on packed question/answer texts; the answers are scored."""
    add_run_adapter(run, model, "sft")
    train_packed(run, "sft", model, examples)
    run.finish("sft", lambda: save_adapter(model, ["sft"], run.out / "sft", str(run.model_folder)))


def add_run_adapter(run: Run, model, name: str):
    """Add an adapter with the run's settings; its random start depends on the seed alone."""
    torch.manual_seed(run.args.seed)
    a = run.args
    add_adapter(model, name, a.lora_r, a.lora_alpha, a.lora_dropout, a.target_modules)


def dpo(run: Run, model, splits, pairs, held_out):
    """Train the adapter `dpo` on top of the frozen `sft`: the reference is `dpo` switched off.

    pairs, held_out: the pairs of `splits` that fit, in tokens.
    """
    args, batch_size = run.args, run.fitted("dpo", len(pairs)).batch_size
    options = dict(beta=args.beta, label_smoothing=args.label_smoothing, kind=args.loss)
    add_run_adapter(run, model, "dpo")
    tell(f"dpo       {len(pairs)} pairs, {len(held_out)} held out")
    reference = open_reference(run, model, splits.train, len(pairs), batch_size)
    eval_reference = open_reference(run, model, splits.evaluation, len(held_out), batch_size)
    eval_order = one_epoch(held_out, batch_size)

    def objective(model, batch):
        policy = preference_logps(model, batch)  # chosen [B], rejected [B]
        ref = reference.logps(model, batch).to(policy[0]).T  # [2, B]
        losses, chosen, rejected = dpo_loss(*policy, *ref, **options)
        return losses, reward_metrics(*policy, chosen, rejected)

    def evaluate_pairs(model):
        policy = pair_logps(model, held_out, eval_order, run.device)
        ref = pair_logps(model, held_out, eval_order, run.device, eval_reference.logps)
        return preference_metrics(policy, ref, **options)

    def keep():
        reference.save()
        eval_reference.save()

    def save():
        keep()
        save_adapter(model, ["sft", "dpo"], run.out / "dpo", str(run.model_folder))

    batches = pair_batches(pairs, batch_size, args.seed)
    collate = partial(collate_pairs, device=run.device)
    run.train("dpo", model, objective, batches, collate, evaluate_pairs, keep)
    run.finish("dpo", save)


def evaluate(run: Run, model, tokenizer, held_out):
    """Compare base, SFT and DPO; write eval.json, samples.md, curves.png and merged/."""
    questions = list(dict.fromkeys(pair.prompt for pair in held_out))
    questions = questions[: 120 if run.on_forum else 16]
    new_tokens = 64 if run.on_forum else 128
    seed, judged = run.args.seed, run.on_forum
    table, greedy = compare(model, tokenizer, questions, run.device, new_tokens, seed, judged, tell)
    rewards = last_evaluation(run.out / "metrics.jsonl")
    table["DPO"]["reward_accuracy"] = rewards["eval_rewards/accuracies"]
    bound = vote_bound(held_out) if judged else None
    write_json(run.out / "eval.json", {"table": table, "held_out": rewards, "vote_bound": bound})
    with whole_file(run.out / "samples.md") as file:
        file.write(format_samples(questions, greedy).encode())
    draw_curves(run.out / "metrics.jsonl", run.out / "curves.png", tell)
    with active_adapters(model, ["dpo"]):
        save_llama(model, run.out / "merged", tokenizer_from=run.model_folder)
    tell(format_summary(table, rewards, bound, questions, greedy))


if __name__ == "__main__":
    run_command(main)
