"""Our DPO training against TRL's, on the same model, pairs, batches and settings.

    python benchmarks/against_trl.py --model path/to/SmolLM2-135M --data pairs.json
    python benchmarks/against_trl.py --model random:llama-2-7b --length 1024 --batch-size 4

Needs `pip install ".[oracle]"`. Each side runs in a process of its own, in turn, for some rounds;
imports, loading and the first --warmup steps are not timed. Tokens are real ones: prompt + chosen
and prompt + rejected of each pair, padding not counted, the prompt counted twice for both sides.
"With the reference" adds the share of the reference's pass, where it is made once, to the time of
the steps. Peak memory is that of the reference's pass and of training, loading left out; on a CPU
it is the whole process's, Python and libraries included (memory_before_gb in the JSON).

All sides train the same initial adapter (rank 8, q_proj and v_proj) over the same base in NF4 with
double quantization, by AdamW, with our learning rates, logging every step. The batches are those of
our `batch_order`: that favours TRL, whose own random batches pad more. In float32 the losses of
ours and trl-best agree to four digits; in bfloat16 rounding moves single steps' by some 0.03.

  ours         `loop.train` as train.py calls it; adapters in float32
  ours-compile the same with each block compiled
  trl-best     TRL as fast as its settings make it: model and adapters in --dtype, no autocast,
               reference log-probabilities computed once, fused AdamW, SDPA or flash attention
  trl-compile  trl-best with TRL's own torch_compile, which compiles anew for each length of rows
  trl-default  DPOTrainer(model, quantization_config, peft_config) with TRL's defaults: weights that
               are not quantized in float32, adapters in bfloat16, autocast to bfloat16, and a
               reference pass in each step, and gradient checkpointing whatever the flag here says.
               (BitsAndBytesConfig's own defaults, FP4 and float32, are not used: a user asks for
               NF4 and bfloat16.)

Not used on either side: kernels that have to be installed apart (Liger's, the hub's), except flash
attention. TRL's padding_free does nothing in this release. Gradient checkpointing is on by default,
as it is in both; --no-gradient-checkpointing is for ours and trl-best alike. On a CPU nothing else
should run: threads that wait for each other share badly. A process that compiles holds the compiler
as well.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from models import model_folder
from record import machine_record, write_result
from step import peak_memory, reset_peak, wait

from dpo_minimal.batches import pair_batch
from dpo_minimal.checkpoint import load_llama, read_config
from dpo_minimal.data import EncodedPair, encode_pairs, load_pairs
from dpo_minimal.evaluate import one_epoch, pair_logps
from dpo_minimal.loop import Log, Settings, learning_rate, train
from dpo_minimal.lora import active_adapters, add_adapter
from dpo_minimal.loss import dpo_loss, preference_logps, reward_metrics
from dpo_minimal.tokenizer import load_tokenizer

SIDES = ("ours", "ours-compile", "trl-best", "trl-compile", "trl-default")
BETA = 0.1
LORA = {"r": 8, "alpha": 16, "dropout": 0.0, "targets": "q_proj,v_proj"}


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model", required=True, help="model folder, or random:SHAPE (see models.py)")
    add("--data", help="preference file; without it random tokens, all rows of --length")
    add("--sides", nargs="+", choices=SIDES, default=["ours", "trl-best", "trl-default"])
    add("--batch-size", type=int, default=4, help="pairs a forward pass")
    add("--grad-accum", type=int, default=1, help="forward passes a step")
    add("--length", type=int, default=1024, help="tokens a sequence: of each, or (data) at most")
    add("--prompt-length", type=int, help="tokens of random prompts (half of --length)")
    add("--steps", type=int, default=20, help="timed steps a round")
    add("--warmup", type=int, default=5, help="steps before them, not timed")
    add("--rounds", type=int, default=3)
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    on_off = argparse.BooleanOptionalAction
    add("--gradient-checkpointing", action=on_off, default=True)
    add("--compile", action="store_true", help="add the side ours-compile")
    add("--threads", type=int, default=torch.get_num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=device)
    add("--scratch", help="where random models are made")
    add("--out", help="benchmarks/results/against_trl-NAME.json")
    # What the program calls itself with, once a side and round:
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    add("--report", help=argparse.SUPPRESS)
    return parser


def main():
    """Run each side as a child process in each round; print and write the figures."""
    args = make_parser().parse_args()
    if args.side:
        measure(args)
        return
    sides = args.sides + ["ours-compile"] * (args.compile and "ours-compile" not in args.sides)
    model_folder(args.model, args.scratch)  # made here, not within a child
    rounds, load = [], os.getloadavg()[0]
    for number in range(args.rounds):
        rounds.append({})
        # To and fro, so that a machine that slows down does not favour a side.
        for side in sides if number % 2 == 0 else sides[::-1]:
            rounds[-1][side] = run_side(side, args)
            print(f"round {number + 1}  {side:12}  {short(rounds[-1][side])}", flush=True)
        write(args, load, summarize(sides, rounds), rounds)  # what there is, if time runs out
    print(format_table(summarize(sides, rounds)))


def write(args, load: float, summary: dict, rounds: list):
    """The figures so far as JSON."""
    name = Path(args.model).name.replace(":", "-")
    arguments = vars(args) | {"model": name, "data": args.data and Path(args.data).name}
    settings = {k: v for k, v in arguments.items() if k not in ("out", "side", "report", "scratch")}
    record = {"machine": machine_record() | {"load_average_before": load}, "arguments": settings}
    out = args.out or Path(__file__).parent / "results" / f"against_trl-{name}.json"
    write_result(out, record | {"summary": summary, "rounds": rounds})


def run_side(side: str, args) -> dict:
    """One side's figures in one round, from a new process; {"error": ...} if it failed."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | offline | {"OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--report", report]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        if child.returncode == 0:
            return json.loads(report.read_text())
    print(child.stderr[-3000:], file=sys.stderr, flush=True)
    return {"error": (child.stderr.strip().splitlines() or ["killed"])[-1]}


def measure(args):
    """The child: one side, its figures written to --report."""
    torch.set_num_threads(args.threads)
    folder = model_folder(args.model, args.scratch)
    pairs, order = make_batches(folder, args)
    run = run_trl if args.side.startswith("trl") else run_ours
    with tempfile.TemporaryDirectory() as scratch:
        side = run(folder, pairs, order, args, Path(scratch))
    Path(args.report).write_text(json.dumps(figures(side, pairs, order, args)))


def figures(side: dict, pairs, order, args) -> dict:
    """What one side did in its timed steps."""
    # Moments when the last N + 1 steps were done, on the wall's clock and the process's own.
    times, cpu_times = zip(*side.pop("times")[args.warmup - 1 :], strict=True)
    seconds, losses = times[-1] - times[0], side.pop("losses")
    timed = sum(order[args.warmup * args.grad_accum :], [])
    tokens = sum(pair_tokens(pairs[i]) for i in timed)
    reference = side.pop("reference_seconds") * len(timed) / sum(map(len, order))
    return side | {
        **{"tokens": tokens, "seconds": seconds, "reference_seconds": reference},
        "cpu_seconds": cpu_times[-1] - cpu_times[0],
        "seconds_per_step": seconds / args.steps,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_with_reference": tokens / (seconds + reference),
        "step_seconds": [b - a for a, b in itertools.pairwise(times)],
        "peak_memory_gb": peak_memory(args.device) / 1e9,
        **{"first_loss": losses[0], "last_loss": losses[-1]},
        "mean_loss": statistics.mean(losses[args.warmup :]),
    }


@torch.no_grad()
def start_adapter(model):
    """Give the adapter the same random A on every side, so that the losses can be compared."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(values)


def pair_tokens(pair: EncodedPair) -> int:
    """Tokens of prompt + chosen and prompt + rejected."""
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def make_batches(folder, args):
    """The encoded pairs, and the batches of all steps as lists of indices."""
    needed = (args.warmup + args.steps) * args.grad_accum
    if args.data:
        texts = load_pairs(args.data, log=lambda line: None)
        pairs = encode_pairs(load_tokenizer(folder), texts, args.length, "pairs")
    else:
        pairs = random_pairs(needed * args.batch_size, read_config(folder).vocab_size, args)
    # Full batches only: TRL cuts its batches from one list of pairs.
    order = [b for b in one_epoch(pairs, args.batch_size) if len(b) == args.batch_size]
    if len(order) < needed:
        raise SystemExit(
            f"{needed} batches of {args.batch_size} are wanted, {len(order)} are there"
        )
    return pairs, order[:needed]


def random_pairs(count: int, vocab_size: int, args) -> list[EncodedPair]:
    """Pairs of random token ids, each prompt + answer of --length tokens."""
    rng = random.Random(0)
    prompt = args.prompt_length or args.length // 2
    answer = args.length - prompt

    def tokens(length):
        return rng.choices(range(3, vocab_size), k=length)

    return [EncodedPair(*map(tokens, (prompt, answer, answer))) for _ in range(count)]


# --- ours -------------------------------------------------------------------------------------


class Clock(Log):
    """The loop's log, which also notes when each step was done."""

    def rewind(self, step):
        super().rewind(step)
        self.times, self.losses = [], []

    def write(self, step, prefix="", **metrics):
        super().write(step, prefix, **metrics)
        self.times.append((time.perf_counter(), time.process_time()))
        self.losses.append(metrics["loss"])


def run_ours(folder, pairs, order, args, scratch) -> dict:
    """The DPO stage of train.py on top of the bare base."""
    memory_before = peak_memory(args.device)
    model = load_llama(folder, args.device, getattr(torch, args.dtype), "nf4")
    add_adapter(model, "dpo", **LORA)
    start_adapter(model)
    load_peak = peak_memory(args.device)
    reset_peak(args.device)
    if args.side == "ours-compile":
        for block in model.model.layers:
            block.compile()
    with active_adapters(model, []):
        pair_logps(model, pairs, order[:2], args.device)  # compiles, where it does
        started = time.perf_counter()
        reference = pair_logps(model, pairs, order, args.device)  # on the CPU: it has waited
    reference_seconds = time.perf_counter() - started
    model.gradient_checkpointing = args.gradient_checkpointing
    settings = make_settings(args)
    steps = args.warmup + args.steps
    clock = Clock(scratch / "metrics.jsonl", "dpo", steps)
    collate = partial(pair_batch, pairs, device=args.device)
    state = scratch / "state.pt"
    train(model, our_objective(reference), iter(order), collate, steps, settings, clock, state)
    return {
        **{"times": clock.times, "losses": clock.losses, "reference_seconds": reference_seconds},
        **{"memory_before_gb": memory_before / 1e9, "load_peak_gb": load_peak / 1e9},
    }


def our_objective(reference):
    """The objective of train.py's DPO stage."""

    def objective(model, batch):
        policy = preference_logps(model, batch)  # chosen [B], rejected [B]
        ref = reference[batch.indices].to(policy[0]).T  # [2, B]
        losses, chosen, rejected = dpo_loss(*policy, *ref, beta=BETA)
        return losses, reward_metrics(*policy, chosen, rejected)

    return objective


def make_settings(args) -> Settings:
    """How both sides train."""
    warmup = max(1, (args.warmup + args.steps) // 10)
    return Settings(5e-4, args.batch_size, args.grad_accum, warmup_steps=warmup)


# --- TRL --------------------------------------------------------------------------------------


def run_trl(folder, pairs, order, args, scratch) -> dict:
    """TRL's trainer over the same pairs in the same order."""
    import datasets
    import transformers
    import trl

    memory_before = peak_memory(args.device)
    rows = [pairs[i]._asdict() for batch in order for i in batch]
    rows = [{f"{name}_ids": ids for name, ids in row.items()} for row in rows]
    trainer = trainer_class(trl, transformers, args)(
        str(folder),
        args=trl.DPOConfig(output_dir=str(scratch), **trl_settings(args)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(transformers),
        **qlora(args),
    )
    start_adapter(trainer.model)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        **{"times": trainer.times, "losses": losses},
        "reference_seconds": trainer.reference_seconds,
        **{"memory_before_gb": memory_before / 1e9, "load_peak_gb": trainer.load_peak / 1e9},
    }


def qlora(args) -> dict:
    """What DPOTrainer is told of quantization and adapters."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, args.dtype),
    )
    adapter = LoraConfig(
        r=LORA["r"],
        lora_alpha=LORA["alpha"],
        lora_dropout=LORA["dropout"],
        target_modules=LORA["targets"].split(","),
        task_type="CAUSAL_LM",
    )
    return {"quantization_config": quantization, "peft_config": adapter}


def trl_settings(args) -> dict:
    """The arguments of DPOConfig."""
    settings = make_settings(args)
    common = {
        "beta": BETA,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.grad_accum,
        "max_steps": args.warmup + args.steps,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "max_length": args.length,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "model_init_kwargs": {"device_map": {"": 0 if args.device == "cuda" else "cpu"}},
    }
    if args.side == "trl-default":
        return common | {"bf16": args.dtype == "bfloat16"}
    return common | {
        "bf16": False,  # no autocast: the model is in --dtype as a whole
        "gradient_checkpointing": args.gradient_checkpointing,
        "precompute_ref_log_probs": True,
        "optim": "adamw_torch_fused",
        "torch_compile": args.side == "trl-compile",
        "model_init_kwargs": common["model_init_kwargs"]
        | {"dtype": args.dtype, "attn_implementation": fastest_attention(args)},
    }


def fastest_attention(args) -> str:
    """Flash attention where it is installed, else torch's own."""
    from transformers.utils import is_flash_attn_2_available

    flash = args.device == "cuda" and args.dtype == "bfloat16" and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


def trainer_class(trl, transformers, args):
    """DPOTrainer over ids in their order, with our learning rates and a clock."""
    settings, steps = make_settings(args), args.warmup + args.steps

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, _, state, control, **kwargs):
            if state.global_step in (args.warmup, steps):
                wait()
            self.trainer.times.append((time.perf_counter(), time.process_time()))

    class Trainer(trl.DPOTrainer):
        reference_seconds = 0.0

        def __init__(self, *positional, **named):
            super().__init__(*positional, **named)
            clock = Clock()
            clock.trainer, self.times = self, []
            self.add_callback(clock)

        def _prepare_dataset(self, dataset, *_):
            self.load_peak = peak_memory(args.device)  # the model is loaded, nothing has run yet
            reset_peak(args.device)
            return dataset

        def _precompute_ref_logps(self, *positional):
            # In eval mode bitsandbytes repacks its weights on some CPUs, and gradients are wrong
            # from then on. Without dropout the modes are the same.
            self.model.train()
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*positional)
            self.reference_seconds = time.perf_counter() - started
            return dataset

        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

        def create_scheduler(self, num_training_steps, optimizer=None):
            def factor(step):
                return learning_rate(step, steps, settings) / settings.learning_rate

            optimizer = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            return self.lr_scheduler

    return Trainer


def word_tokenizer(transformers):
    """TRL asks for a tokenizer, if only for its special tokens: the pairs have ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model = Tokenizer(WordLevel({f"<{i}>": i for i in range(3)}, unk_token="<0>"))
    special = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


# --- figures ----------------------------------------------------------------------------------


def short(figures: dict) -> str:
    """One side's round on a line."""
    if "error" in figures:
        return f"failed: {figures['error']}"
    cores = figures["cpu_seconds"] / figures["seconds"]
    return (
        f"{figures['tokens_per_second']:9,.1f} tokens/s  {figures['seconds_per_step']:.3f} s/step  "
        f"{cores:.1f} cores  reference {figures['reference_seconds']:.1f} s  "
        f"peak {figures['peak_memory_gb']:.2f} GB  "
        f"loss {figures['first_loss']:.4f} to {figures['last_loss']:.4f}, "
        f"mean {figures['mean_loss']:.4f}"
    )


def summarize(sides, rounds) -> dict:
    """Medians over the rounds for each side; medians and ranges of the ratios within a round."""
    summary = {"sides": {}, "ratios": {}}
    for side in sides:
        good = [round_[side] for round_ in rounds if "error" not in round_[side]]
        names = [k for k in good[0] if k != "step_seconds"] if good else []
        summary["sides"][side] = {k: statistics.median(run[k] for run in good) for k in names}
    for ours, theirs in itertools.product(sides, sides):
        both = [r for r in rounds if "error" not in r[ours] and "error" not in r[theirs]]
        if not ours.startswith("ours") or theirs.startswith("ours") or not both:
            continue
        for key in ("tokens_per_second", "tokens_per_second_with_reference"):
            ratios = [round_[ours][key] / round_[theirs][key] for round_ in both]
            spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
            summary["ratios"].setdefault(f"{ours} / {theirs}", {})[key] = spread
    return summary


def format_table(summary: dict) -> str:
    """The medians and the ratios as Markdown."""
    lines = [
        "",
        "| side | tokens/s | with the reference | s/step | peak GB | last loss | mean loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, f in summary["sides"].items():
        cells = ["failed"] + ["-"] * 5
        if f:
            both = f["tokens_per_second"], f["tokens_per_second_with_reference"]
            cells = [f"{value:,.1f}" for value in both] + [f"{f['seconds_per_step']:.3f}"]
            cells += [f"{f['peak_memory_gb']:.2f}"]
            cells += [f"{f[name]:.4f}" for name in ("last_loss", "mean_loss")]
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    lines += ["", "| ratio of tokens/s | training | with the reference |", "|---|---|---|"]
    for name, ratios in summary["ratios"].items():
        cells = [f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" for r in ratios.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
