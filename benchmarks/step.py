"""The time and the peak memory of one DPO step of this project. Other benchmarks build on it.

    python benchmarks/step.py --model random:smollm2-135m --pairs 4 --length 512

A step is what dpo_minimal.loop does: forward, loss, backward, clipping, AdamW. The reference's
log-probabilities are known before it starts. Tokens are random. All pairs have the same length, so
there is no padding.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from models import model_folder
from record import python_command, save, script_parser

from dpo_minimal.batches import pair_batch
from dpo_minimal.checkpoint import load_llama
from dpo_minimal.data import EncodedPair
from dpo_minimal.lora import add_adapter
from dpo_minimal.loss import dpo_loss, preference_logps
from dpo_minimal.nf4 import keep_weights


def step_parser(description: str, **defaults) -> argparse.ArgumentParser:
    """The flags that describe a step. They have train.py's names where train.py has them too."""
    parser = script_parser(description)
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", default="random:smollm2-135m", help="a folder, or random:SHAPE")
    add("--scratch", help="where random models are made (default: ~/.cache)")
    add("--pairs", type=int, default=4, help="pairs per step")
    add("--length", type=int, default=512, help="tokens of prompt + answer")
    add("--prompt", type=int, help="tokens of the prompt (default: half of --length)")
    add("--r", type=int, default=8, help="rank of the adapters")
    add("--targets", default="q_proj,v_proj", help="linear layers with adapters, or all")
    add("--dropout", type=float, default=0.05)
    add("--gradient-checkpointing", action=on_off, default=True)
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--threads", type=int, help="CPU threads (default: torch chooses)")
    add("--steps", type=int, default=5, help="timed steps, after one to warm up")
    add("--json", help="write the figures to this file")
    parser.set_defaults(**defaults)
    return parser


def read_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, with device, dtype, prompt length and threads filled in."""
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    args.prompt = args.length // 2 if args.prompt is None else args.prompt
    if args.threads:
        torch.set_num_threads(args.threads)
    args.threads = torch.get_num_threads()
    return args


def step_flags(args, **changes) -> list[str]:
    """The flags for another process that takes the same step, or one with `changes`."""
    known = {action.dest for action in step_parser("")._actions} - {"help", "json"}
    flags = []
    for name, value in (vars(args) | changes).items():
        flag = name.replace("_", "-")
        if name not in known or value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def build_model(args):
    """The model as DPO trains it: an NF4 base, a frozen adapter `sft`, a trainable one `dpo`."""
    folder = model_folder(args.model, args.scratch)
    model = load_llama(folder, args.device, getattr(torch, args.dtype))
    lora = dict(r=args.r, alpha=2 * args.r, dropout=args.dropout, targets=args.targets)
    for name in ("sft", "dpo"):
        add_adapter(model, name, **lora)
    model.gradient_checkpointing = args.gradient_checkpointing
    keep_weights(model, args.gradient_checkpointing)
    return model.train()


def make_batch(args, vocab_size: int, device=None):
    """--pairs pairs of random tokens, as a batch of the training loop."""
    generator = torch.Generator().manual_seed(0)
    parts = (args.prompt, args.length - args.prompt, args.length - args.prompt)

    def ids(count):
        return torch.randint(vocab_size, (count,), generator=generator).tolist()

    pairs = [EncodedPair(*map(ids, parts)) for _ in range(args.pairs)]
    return pair_batch(pairs, list(range(args.pairs)), device or args.device)


def dpo_losses(model, batch) -> torch.Tensor:
    """The loss of each pair, [pairs], against a made-up reference."""
    policy_chosen_logps, policy_rejected_logps = preference_logps(model, batch)
    losses, _, _ = dpo_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        ref_chosen_logps=policy_chosen_logps.detach(),
        ref_rejected_logps=policy_rejected_logps.detach(),
        beta=0.1,
    )
    return losses


def make_step(model, batch):
    """(function that takes one whole training step, the trained parameters, their optimizer)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> float:
        loss = dpo_losses(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the GPU

    return step, parameters, optimizer


def seconds_each(run, times: int) -> list[float]:
    """The time of each of `times` calls, after one that is not counted."""
    run()
    return [seconds_of(run) for _ in range(times)]


def seconds_of(run) -> float:
    """The time of one call."""
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def wait():
    """Wait until the GPU, if there is one, has done all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- peak memory ------------------------------------------------------------------------------


def memory_now(device: str) -> int:
    """Bytes held now: those of tensors on a GPU, else the resident memory of the process."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated()
    return status_bytes("VmRSS") or peak_memory(device)


def reset_peak(device: str):
    """Forget the peak so far, so that `peak_memory` returns the peak of what comes next."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """The most bytes held at once since `reset_peak` (on a CPU without Linux: since the start)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    # Linux has something better than ru_maxrss, which starts at the parent's peak and has no reset.
    return status_bytes("VmHWM") or max_resident(resource.getrusage(resource.RUSAGE_SELF))


def max_resident(usage) -> int:
    """The peak in bytes of what getrusage or wait4 returned, which is in KiB except on a Mac."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def status_bytes(field: str) -> int | None:
    """A field of /proc/self/status, or None where there is no such file."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def measure_step(args) -> dict:
    """Load the model and take the steps: {name: seconds, bytes or a count}."""
    started = time.perf_counter()
    reset_peak(args.device)
    model = build_model(args)
    wait()
    result = {"load_seconds": time.perf_counter() - started}
    result["load_peak_bytes"] = peak_memory(args.device)
    result["loaded_bytes"] = memory_now(args.device)
    batch = make_batch(args, model.config.vocab_size)
    reset_peak(args.device)
    seconds = seconds_each(make_step(model, batch)[0], args.steps)
    return result | {
        "step_seconds": statistics.median(seconds),
        "step_seconds_all": seconds,
        "step_peak_bytes": peak_memory(args.device),
        "tokens": batch.num_tokens,
        "tokens_per_second": batch.num_tokens / statistics.median(seconds),
    }


def run_alone(script: str, flags: list[str], **environment) -> dict:
    """Run a benchmark in a process with its own peak memory, and return its last line (JSON)."""
    command = python_command(Path(__file__).with_name(script), *flags)
    environment = os.environ | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(flags)}: ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """The command line: print one line of JSON."""
    args = read_arguments(step_parser(__doc__))
    result = measure_step(args)
    save(args, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
