"""What to check before a run trains anything, and what to tell before each stage."""

import math

import torch

from dpo_minimal import InputError
from dpo_minimal.extras.machine import memory_now, peak_memory_gb
from dpo_minimal.extras.memory import Step, predict_peak, predict_training
from dpo_minimal.extras.skeleton import skeleton
from dpo_minimal.llama import LlamaConfig
from dpo_minimal.loop import count_steps, steps_per_epoch
from dpo_minimal.lora import add_adapter

SAMPLE = 2000  # examples whose lengths are looked at: large data are tokenized on demand
FEW = 32  # examples, or steps per epoch: with fewer, there is little to learn from


def check_targets(config: LlamaConfig, args):
    """InputError for an unknown --target-modules, before any work is done."""
    with torch.device("meta"):
        add_adapter(skeleton(config), "trial", targets=args.target_modules)


def check_model(run, model, tokenizer, log=print):
    """Check that model, tokenizer and --max-length go together; tell what was loaded."""
    check_fit(run.model_folder, tokenizer, model.config, run.args.max_length, log)
    dtype = str(run.dtype).removeprefix("torch.")
    kind = f"{'not quantized' if run.args.no_quantize else 'nf4'}, {dtype} on {run.device}"
    log(f"model     {run.model_folder}, {kind}, peak memory {peak_memory_gb():.2f} GB so far")


def check_fit(folder, tokenizer, config: LlamaConfig, max_length: int, log=print):
    """InputError if the tokenizer has ids that the model lacks; a warning about long texts."""
    ids = {"BOS": tokenizer.bos_id, "EOS": tokenizer.eos_id, "last id": tokenizer.vocab_size - 1}
    for name, number in ids.items():
        if not 0 <= number < config.vocab_size:
            size = f"the model's vocabulary has {config.vocab_size} entries"
            raise InputError(f"{folder}: the tokenizer's {name} is {number}, but {size}")
    if max_length > config.max_position_embeddings:
        context = f"the model's context of {config.max_position_embeddings} tokens"
        log(f"warning   --max-length {max_length} is longer than {context}")


def tell_plan(run, model, stage, examples, settings, log=print):
    """Tell what a stage is about to do, its steps, tokens, weights, memory; warn of trouble.

    examples: what its rows are made of, EncodedPairs or (unscored ids, scored ids) texts.
    """
    is_dpo, n = stage.name == "dpo", len(examples)
    unit = "pairs" if is_dpo else "rows"
    rows, batches = stage.order.num_rows(), stage.order.num_batches(settings.batch_size)
    steps, epoch = count_steps(settings, batches), steps_per_epoch(settings, batches)
    known = some_of(examples)
    tokens = sum(map(num_tokens, known)) / len(known) * n * steps / epoch
    packed = f"texts in {rows:,} rows of up to {run.args.max_length} tokens"
    log(f"{stage.name:9} {n:,} {'pairs' if is_dpo else packed}")
    if run.args.resume and begun(run.out, stage.name):
        log("          no saved state: begins anew (see --save-every)")
    size = f"{settings.batch_size} x {settings.grad_accum}".removesuffix(" x 1")
    epochs = f"{steps / epoch:.3g} epochs, about {tokens:,.0f} tokens"
    log(f"          {steps:,} steps of {size} {unit}: {epochs}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in skeleton(model.config).parameters())
    log(f"          trains {trained:,} weights; the model has {base:,}")
    if stage.name != "pretrain":
        longest = max(sum(map(len, e)) for e in known)
        tell_memory(run, model, settings, longest, is_dpo, log)
    if is_dpo and settings.stop_when is not None and settings.eval_every >= steps:
        log(f"warning   --stop-when never looks: --eval-every {settings.eval_every}, {steps} steps")
    if n < FEW:
        log(f"warning   {n} {'pairs' if is_dpo else 'texts'} are too few to learn much from")
    elif settings.batch_size * settings.grad_accum > rows:
        log(
            f"warning   a step takes more {unit} than there are: lower --batch-size or --grad-accum"
        )


def begun(out, stage: str) -> bool:
    """Whether a stage has steps in the log of a run, but no state to go on from."""
    log = out / "metrics.jsonl"
    logged = log.exists() and f'"stage": "{stage}"' in log.read_text("utf-8")
    return logged and not (out / "state" / f"{stage}.pt").exists()


def num_tokens(example) -> int:
    """Tokens of a text or pair as the log counts them: a pair's prompt counts twice."""
    prompt, *answers = example
    return sum(len(prompt) + len(answer) for answer in answers)


def tell_memory(run, model, settings, longest: int, is_dpo: bool, log):
    """Tell the memory that a step is predicted to take, and warn if that is more than there is.

    longest: tokens of the longest pair (DPO); packed rows (SFT) are as long as they may be.
    """
    now = memory_now(run.device)
    if now is None:
        return
    width, recompute = longest if is_dpo else run.args.max_length, model.gradient_checkpointing
    more = predicted(run, model.config, settings, width, is_dpo=is_dpo, recompute=recompute)
    held, free = now
    peak = max(peak_memory_gb(), (held + more) / 1e9)
    log(f"          memory: {peak:.2f} GB predicted, {(held + free) / 1e9:.1f} GB available")
    if run.args.gradient_checkpointing is None and run.device.startswith("cuda"):
        word = "on, else it would not fit" if recompute else "off, it fits without"
        log(f"          gradient checkpointing is {word} (see --gradient-checkpointing)")
    if more > free:
        log("warning   that may not fit: lower --batch-size (and raise --grad-accum), --max-length")


def predicted(run, config, settings, width: int, is_dpo: bool, recompute: bool) -> int:
    """Bytes that a step with rows of `width` tokens takes beside the model."""
    args = run.args
    step = Step(
        tokens=settings.batch_size * width,
        width=width,
        scored=settings.batch_size * width,
        adapters=2 if is_dpo else 1,
        r=args.lora_r,
        targets=args.target_modules,
        dropout=args.lora_dropout,
        dtype=run.dtype,
        on_gpu=run.device.startswith("cuda"),
        gradient_checkpointing=recompute,
        quantized=not args.no_quantize,
    )
    return predict_peak(config, step, predict_training(config, step))


def recomputes(run, model, stage, examples, settings) -> bool:
    """Whether to use gradient checkpointing: as the flag says, else on a CPU; on a GPU only if a
    step without it is predicted to take more than 90% of the free memory."""
    if run.args.gradient_checkpointing is not None:
        return run.args.gradient_checkpointing
    if not run.device.startswith("cuda"):
        return True
    is_dpo, width = stage.name == "dpo", run.args.max_length
    if is_dpo:
        width = max(sum(map(len, example)) for example in some_of(examples))
    more = predicted(run, model.config, settings, width, is_dpo=is_dpo, recompute=False)
    return more > 0.9 * memory_now(run.device)[1]


def some_of(examples) -> list:
    """At most SAMPLE examples, from everywhere: those that fit. InputError if none does."""
    indices = range(0, len(examples), math.ceil(len(examples) / SAMPLE))
    some = [e for e in (examples[i] for i in indices) if e is not None]
    if not some:
        raise InputError(f"all {len(indices)} examples looked at are longer than --max-length")
    return some
