"""Training on a very large preference file: seconds to the first step, and peak memory.

    python benchmarks/large_data.py --pairs 1000000 --json large_data.json

Writes synthetic pairs as JSON Lines, then runs `train.py --stage sft` and `--stage dpo` on them
with a tiny model. Each stage is a process of its own, and this one watches its output.
"""

import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from record import TRAIN, python_command, save, script_parser
from step import max_resident

WORDS = "the a this my your old new how why what does make get work with for of in on to is"


def write_pairs(path, count: int, bytes_per_answer: int):
    """Write `count` pairs for a third as many questions. Answers are pieces of one random text."""
    rng = random.Random(0)
    words = WORDS.split()
    text = " ".join(rng.choice(words) + str(rng.randrange(1000)) for _ in range(200_000))
    questions = [f"{i} {text[i % 9999 : i % 9999 + 80]}?" for i in range(max(1, count // 3))]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            starts = (rng.randrange(len(text) - 2 * bytes_per_answer) for _ in range(2))
            # 0.5 to 1.5 times --bytes-per-answer. The added "." keeps the two answers different.
            lengths = (rng.randint(bytes_per_answer // 2, 3 * bytes_per_answer // 2) for _ in "ab")
            chosen, rejected = (text[a : a + n] for a, n in zip(starts, lengths, strict=True))
            row = {"prompt": rng.choice(questions), "chosen": chosen, "rejected": f"{rejected}."}
            file.write(json.dumps(row) + "\n")


def run(*flags) -> subprocess.Popen:
    """Start train.py with these flags. `watch` reads what it prints, line by line."""
    command = python_command("-u", TRAIN, *flags)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def watch(process) -> dict:
    """Seconds until the model is loaded and until the first step is done, and the peak memory."""
    started, seconds = time.perf_counter(), {}
    for line in process.stdout:
        print(f"{time.perf_counter() - started:7.1f} s  {line}", end="", flush=True)
        for name, sign in {"loaded": "model ", "first_step": "step    1/"}.items():
            if sign in line:
                seconds.setdefault(name, round(time.perf_counter() - started, 1))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"train.py ended with status {process.returncode}")
    peak = max_resident(usage) / 1e9
    return {"seconds": seconds, "total": time.perf_counter() - started, "peak_rss_gb": peak}


def measure(args, folder: Path) -> dict:
    """Make the data and a model, then run both stages: {stage: what `watch` measured}."""
    data, started = folder / "pairs.jsonl", time.perf_counter()
    write_pairs(data, args.pairs, args.bytes_per_answer)
    size = data.stat().st_size
    seconds = time.perf_counter() - started
    print(f"{args.pairs} pairs, {size / 1e9:.2f} GB, written in {seconds:.0f} s", flush=True)
    model = args.model
    if not model:
        watch(run("--stage", "pretrain", "--max-steps", 2, "--out", folder / "forum"))
        model = folder / "forum" / "base"
    stages, flags = {}, ["--model", model, "--data", data, "--out", folder / "run"]
    flags += ["--batch-size", 4, "--grad-accum", 1, "--eval-every", 0]
    if args.held_out:
        write_pairs(folder / "held_out.jsonl", args.held_out, args.bytes_per_answer)
        flags += ["--eval-data", folder / "held_out.jsonl"]
    for stage in ("sft", "dpo"):
        more = ["--stage", stage, "--max-steps", args.max_steps, "--max-length", args.max_length]
        stages[stage] = watch(run(*flags, *more))
        print(f"{stage}: {stages[stage]}", flush=True)
    return {"file_gb": size / 1e9, "stages": stages}


def main():
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--bytes-per-answer", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--max-steps", type=int, default=10)
    held_out = "evaluation pairs in their own file (0: train.py holds out 1,000: slow)"
    parser.add_argument("--held-out", type=int, default=32, help=held_out)
    parser.add_argument("--model", help="a model folder (default: a tiny model is made)")
    parser.add_argument("--scratch", help="a folder with room for twice the data")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        result = measure(args, folder)
    finally:
        shutil.rmtree(folder)
    save(args, result)


if __name__ == "__main__":
    main()
