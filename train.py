"""Preference tuning of a Llama, from files to adapters: SFT and DPO with QLoRA, and an evaluation.

    python train.py                            the embedded forum, from nothing, on a laptop
    python train.py --model DIR --data PATH    a real checkpoint and a preference file

The stages, in order: pretrain (only without --model), sft, dpo, evaluate. Read `main` first.
"""

import dpo_minimal.extras.quiet  # noqa: F401, I001 (first: Ctrl-C while the rest loads)
import tempfile
from functools import partial

import torch

from dpo_minimal import forum
from dpo_minimal.batches import packed_batch, packed_order, pair_batch, pair_order
from dpo_minimal.checkpoint import load_adapter, load_llama, save_adapter, save_llama
from dpo_minimal.data import encode_pairs, keep_fitting
from dpo_minimal.evaluate import evaluate_pairs, one_epoch
from dpo_minimal.extras import early, large, parallel, preflight, progress, report, reuse, signals
from dpo_minimal.extras.command_line import run_command
from dpo_minimal.extras.losses import batch_lengths, loss_settings, preference_loss
from dpo_minimal.extras.machine import peak_memory_gb
from dpo_minimal.formats.huggingface import read_config
from dpo_minimal.formats.rows import read_rows
from dpo_minimal.llama import Llama, LlamaConfig
from dpo_minimal.loop import Stage, train
from dpo_minimal.lora import active_adapters, add_adapter
from dpo_minimal.loss import preference_logps, reward_metrics, sft_loss
from dpo_minimal.nf4 import keep_weights
from dpo_minimal.reference import known_reference_logps
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


def main():
    """Check and read everything, then run the stages in order: each saves what the next reads."""
    run = read_run(__doc__)
    args, max_length = run.args, run.args.max_length
    preflight.check_targets(read_config(args.model) if args.model else TINY_LLAMA, args)
    if run.on_forum:
        run.start()
        if parallel.first() and not (run.out / "data").exists():
            forum.write_forum(run.out / "data", args.seed)
        parallel.wait()
    if run.is_due("pretrain"):
        pretrain(run)
    if not any(map(run.is_due, ("sft", "dpo", "evaluate"))):
        tell(f"done      {run.out}: every stage that was asked for is finished")
        return
    tokenizer = load_tokenizer(run.model_folder, run.template)  # None: the blog's text
    data = args.data or run.out / "data"
    # `large` has data.py's functions for data of any size; it keeps held-out pairs few.
    splits = large.load_splits(data, args.eval_data, args.seed, tell, folder=run.scratch)
    texts, window = large.encode_sft(tokenizer, splits.sft, max_length, tell)  # window: see there
    pairs = large.encode_pairs(tokenizer, splits.train, max_length, "training pairs", tell)
    held_out = encode_pairs(tokenizer, splits.evaluation, max_length, "held-out pairs", tell)
    quantize = None if args.no_quantize else "nf4"
    model = load_llama(run.model_folder, run.device, run.dtype, quantize)
    preflight.check_model(run, model, tokenizer, tell)
    if not run.on_forum:
        run.start()
    if run.is_due("sft"):
        sft(run, model, texts, window)
    if not args.no_sft:
        load_adapter(model, run.out / "sft", "sft")  # the saved weights, whoever trained them
    if run.is_due("dpo"):
        dpo(run, model, pairs, held_out)
    parallel.leave()  # process 0 goes on alone
    if run.is_due("evaluate"):
        load_adapter(model, run.out / "dpo", "dpo")  # this one is sft + dpo: activate it alone
        batch_size = run.settings_for("dpo", len(pairs)).batch_size  # as in training
        evaluate(run, model, tokenizer, splits.evaluation, held_out, batch_size)
    tell(f"done      {run.out}, peak memory {peak_memory_gb():.2f} GB")


def tell(text: str):
    """Print a line of progress, in process 0 only."""
    if parallel.first():
        print(text, flush=True)


def add_run_adapter(run: Run, model, name: str):
    """Add an adapter with the run's settings, initialized from the seed alone."""
    torch.manual_seed(run.args.seed)
    args = run.args
    add_adapter(
        model,
        name,
        r=args.lora_r,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        targets=args.target_modules,
    )


def train_stage(run: Run, model, stage: Stage, examples, settings):
    """Set up the model as the flags say, tell what is about to happen, then train it."""
    model.gradient_checkpointing = preflight.recomputes(run, model, stage, examples, settings)
    keep_weights(model, keep=model.gradient_checkpointing)
    if run.args.compile:
        for block in model.model.layers:
            block.compile()
    preflight.tell_plan(run, model, stage, examples, settings, tell)
    with progress.watched(model.model.layers, run.args.compile), signals.caught() as asked:
        train(model, stage, settings, run.out, resume=run.args.resume, asked=asked)


def pretrain(run: Run):
    """Make a tokenizer and a tiny Llama that has read the forum's threads: base/."""
    threads = [row["text"] for _, row in read_rows(run.out / "data" / "pretrain" / "forum.jsonl")]
    torch.manual_seed(run.args.seed)
    model = Llama(TINY_LLAMA).to(run.device)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(threads, TINY_LLAMA.vocab_size, f"{folder}/tokenizer.model")
        tell(f"tokenizer {tokenizer.vocab_size} pieces from {len(threads)} threads")
        max_length, encoded = run.args.max_length, []
        for thread in threads:
            ids = tokenizer.encode(thread, eos=True)
            encoded.append(([tokenizer.bos_id], ids) if 1 + len(ids) <= max_length else None)
        texts = keep_fitting(encoded, max_length, "threads", tell)
        train_packed(run, "pretrain", model, texts, len(texts))
        run.finish("pretrain", lambda: save_llama(model, run.out / "base", tokenizer_from=folder))


def train_packed(run: Run, name: str, model, texts, window: int):
    """Pretraining and SFT: train on (unscored ids, scored ids) texts, packed into full rows.

    window: how many texts are packed together.
    """
    order = packed_order(texts, run.args.max_length, window, run.args.seed)
    collate = partial(packed_batch, texts, device=run.device)
    stage = Stage(name, token_objective, order, collate)
    train_stage(run, model, stage, texts, run.settings_for(name, order.num_rows()))


def token_objective(model, batch):
    """Pretraining and SFT: the cross-entropy of each scored token."""
    losses = sft_loss(
        model, batch.tokens, batch.loss_mask, positions=batch.positions, mask=batch.mask
    )
    return losses, {}


def sft(run: Run, model, texts, window: int):
    """Train the adapter `sft` on packed question/answer texts; the answers are scored."""
    if run.args.sft_adapter:  # somebody else did
        load_adapter(model, run.args.sft_adapter, "sft")
    else:
        add_run_adapter(run, model, "sft")
        train_packed(run, "sft", model, texts, window)
    run.finish("sft", partial(save_adapter, model, ["sft"], run.out / "sft", *run.about))


def dpo(run: Run, model, pairs, held_out):
    """Train the adapter `dpo` on top of the frozen `sft`; the reference is without `dpo`.

    pairs, held_out: sequences of EncodedPairs.
    """
    tell(f"dpo       {len(held_out):,} pairs are held out")
    add_run_adapter(run, model, "dpo")
    args, settings = run.args, run.settings_for("dpo", len(pairs))
    loss = loss_settings(vars(args))
    tables = reuse.known_tables(run, {"training": len(pairs), "held-out": len(held_out)})

    def objective(model, batch):
        policy_chosen_logps, policy_rejected_logps = preference_logps(model, batch)  # [B] each
        ref_logps = known_reference_logps(model, batch, tables["training"])  # [B, 2]
        ref_chosen_logps, ref_rejected_logps = ref_logps.to(policy_chosen_logps).T
        losses, chosen_rewards, rejected_rewards = preference_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            lengths=batch_lengths(batch),
            settings=loss,
        )
        return losses, reward_metrics(
            policy_chosen_logps, policy_rejected_logps, chosen_rewards, rejected_rewards
        )

    evaluate_held_out = evaluation_of(run, held_out, tables["held-out"], settings.batch_size)
    evaluate_held_out = early.with_kl(run, model, held_out, evaluate_held_out)
    order = pair_order(pairs, settings.batch_size, args.seed)
    collate = partial(pair_batch, pairs, device=run.device)
    stage = Stage("dpo", objective, order, collate, evaluate_held_out, tables)
    train_stage(run, model, stage, pairs, settings)
    reuse.keep_tables(run, tables)
    run.finish("dpo", partial(save_adapter, model, ["sft", "dpo"], run.out / "dpo", *run.about))


def evaluation_of(run: Run, pairs, ref_table, batch_size: int):
    """What measures EncodedPairs under a model's active adapters; see `evaluate_pairs`."""
    return partial(
        evaluate_pairs,
        pairs=pairs,
        batches=one_epoch(pairs, batch_size),
        ref_table=ref_table,
        settings=loss_settings(vars(run.args)),
        device=run.device,
    )


def evaluate(run: Run, model, tokenizer, texts, pairs, batch_size: int):
    """Measure DPO on held-out pairs (texts, and in tokens those that fit); merged/ comes last."""
    table = reuse.known_tables(run, {"held-out": len(pairs)})["held-out"]
    measure = evaluation_of(run, pairs, table, batch_size)
    with active_adapters(model, ["dpo"]):
        held_out = report.describe_pairs(run, texts, pairs, measure(model))
        card = report.write_results(run, model, tokenizer, texts, held_out, tell)
        base, about = run.model_folder, partial(run.describe, card=card)
        save_llama(model, run.out / "merged", tokenizer_from=base, add=about)


if __name__ == "__main__":
    run_command(main)
