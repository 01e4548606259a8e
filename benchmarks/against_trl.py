"""Our DPO training against TRL's, on the same model, pairs, batches and settings.

    python benchmarks/against_trl.py --model path/to/SmolLM2-135M --data pairs.json
    python benchmarks/against_trl.py --model random:llama-2-7b --length 1024 --batch-size 4

Needs `pip install ".[oracle]"`. The sides take turns for some rounds, each in a process of its own.
Imports, loading and the first --warmup steps are not timed. Only real tokens count: prompt + chosen
and prompt + rejected of each pair. Padding does not count, and the prompt counts twice for every
side. Where the reference's pass is made once, "with the reference" adds its share to the time of
the steps. Peak memory is the peak in the reference's pass and in training, without loading. On a
CPU it is that of the whole process with Python and libraries (memory_before_gb in the JSON).

All sides train the same initial adapter (rank 8, q_proj and v_proj) over the same base in NF4 with
double quantization, with AdamW and our learning rates, and log every step. The batches are those of
our `one_epoch`. That favours TRL, because its own random batches have more padding. In float32
the losses of ours and trl-best agree to four digits. In bfloat16 rounding changes the loss of a
single step by about 0.03.

  ours         `loop.train` as train.py calls it; adapters in float32
  ours-compile the same with each block compiled
  trl-best     the fastest settings of TRL: model and adapters in --dtype, no autocast, reference
               log-probabilities computed once, fused AdamW, SDPA or flash attention
  trl-compile  trl-best with TRL's own torch_compile, which compiles again for each row length
  trl-default  DPOTrainer(model, quantization_config, peft_config) with TRL's defaults: weights that
               are not quantized in float32, adapters in bfloat16, autocast to bfloat16, a reference
               pass in each step, and gradient checkpointing whatever the flag here says.
               (BitsAndBytesConfig's own defaults, FP4 and float32, are not used, because a user
               asks for NF4 and bfloat16.)

No side uses kernels that have to be installed separately (Liger's, the hub's), except flash
attention. TRL's padding_free does nothing in this release. Gradient checkpointing is on by default,
as it is in both projects; --no-gradient-checkpointing applies to ours and trl-best alike. On a CPU
nothing else should run, because threads that wait for each other share cores badly. Where a side
compiles, its memory includes the compiler.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from models import model_folder
from our_side import run_ours
from record import (
    in_turn,
    machine_record,
    python_command,
    script_parser,
    settings_record,
    spread,
    write_result,
)
from same_task import make_batches, pair_tokens
from step import peak_memory

SIDES = ("ours", "ours-compile", "trl-best", "trl-compile", "trl-default")


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="model folder, or random:SHAPE (see models.py)")
    add("--data", help="preference file (default: random tokens in rows of --length)")
    add("--sides", nargs="+", choices=SIDES, default=["ours", "trl-best", "trl-default"])
    add("--batch-size", type=int, default=4, help="pairs per forward pass")
    add("--grad-accum", type=int, default=1, help="forward passes per step")
    add("--length", type=int, default=1024, help="tokens per sequence (with --data: at most)")
    add("--prompt-length", type=int, help="tokens of random prompts (default: half of --length)")
    add("--steps", type=int, default=20, help="timed steps per round")
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
    # Only for its own child processes, one per side and round:
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
    model_folder(args.model, args.scratch)  # made here: the child processes only read it
    rounds, load = [], os.getloadavg()[0]
    for number in range(args.rounds):
        rounds.append({})
        for side in in_turn(sides, number):
            rounds[-1][side] = run_side(side, args)
            print(f"round {number + 1}  {side:12}  {short(rounds[-1][side])}", flush=True)
        write(args, load, summarize(sides, rounds), rounds)  # each round, in case time runs out
    print(format_table(summarize(sides, rounds)))


def write(args, load: float, summary: dict, rounds: list):
    """Write the figures so far as JSON."""
    name = Path(args.model).name.replace(":", "-")
    machine = machine_record() | {"load_average_before": load}
    record = {"machine": machine, "arguments": settings_record(args)}
    out = args.out or Path(__file__).parent / "results" / f"against_trl-{name}.json"
    write_result(out, record | {"summary": summary, "rounds": rounds})


def run_side(side: str, args) -> dict:
    """The figures of one side in one round, from a new process. {"error": ...} if it failed."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | offline | {"OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = python_command(__file__, *sys.argv[1:], "--side", side, "--report", report)
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        if child.returncode == 0:
            return json.loads(report.read_text())
    print(child.stderr[-3000:], file=sys.stderr, flush=True)
    return {"error": (child.stderr.strip().splitlines() or ["killed"])[-1]}


def measure(args):
    """In the child process: run one side and write its figures to --report."""
    torch.set_num_threads(args.threads)
    folder = model_folder(args.model, args.scratch)
    pairs, order = make_batches(folder, args)
    run = run_ours
    if args.side.startswith("trl"):
        from trl_side import run_trl as run  # not on top: our side runs without TRL's libraries
    with tempfile.TemporaryDirectory() as scratch:
        side = run(folder, pairs, order, args, Path(scratch))
    Path(args.report).write_text(json.dumps(figures(side, pairs, order, args)))


def figures(side: dict, pairs, order, args) -> dict:
    """The figures of the timed steps of one side."""
    # When the last --steps + 1 steps were done, in wall-clock time and in CPU time.
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


# --- the summary ------------------------------------------------------------------------------


def short(figures: dict) -> str:
    """One round of one side, on one line."""
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
    """Medians over the rounds for each side, medians and ranges of the ratios within a round."""
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
            summary["ratios"].setdefault(f"{ours} / {theirs}", {})[key] = spread(ratios)
    return summary


def format_table(summary: dict) -> str:
    """The medians and the ratios as Markdown tables."""
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
