"""Kill runs, resume them until they finish, and compare every file with an undisturbed run's.

    python tests/faults/kill.py --kills 100 --seed 0      some ten minutes on one core
    python tests/faults/kill.py --starts 20               two at once in one folder, 20 times

A kill is a SIGKILL: at a random moment, or at a random file event (before a file is opened for
writing, renamed, removed, synced, or a folder is made), or with a file half written. What a power
cut does can only be shown in part: a file must have been synced before it is renamed.
Exit status 1 if a run cannot go on, differs, or leaves something over. POSIX only.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from conftest import SHAPE  # noqa: E402
from killed import run, start  # noqa: E402

import train  # noqa: E402
from dpo_minimal import forum  # noqa: E402
from dpo_minimal.extras import report  # noqa: E402
from dpo_minimal.formats.huggingface import save_llama  # noqa: E402
from dpo_minimal.llama import Llama, LlamaConfig  # noqa: E402
from dpo_minimal.run import PRODUCTS  # noqa: E402
from dpo_minimal.tokenizer import train_tokenizer  # noqa: E402

# What depends on the clock, the machine or the process, and on whether a run was resumed.
TIMING = ("tokens_per_second", "peak_memory_gb")
KINDS = ("moment", "event", "half-written")
PARTS = {"pretrain": 300, "finetune": 24, "rl": 40, "evaluation": 12}
FLAGS = ["--batch-size", 2, "--save-every", 1, "--max-length", 96]
FORUM = ["--max-steps", 4, "--eval-every", 3, *FLAGS, "--max-length", 128]
# More steps than an epoch has, so that the place in the order matters; states older than the log.
MODEL = ["--grad-accum", 2, "--max-steps", 7, "--epochs", 9, *FLAGS, "--save-every", 2]


@dataclass
class World:
    """A run to disturb: its flags, and of an undisturbed one the folder, seconds and events."""

    name: str
    flags: list[str]
    out: Path  # always the same: the products name it
    expected: Path
    seconds: float = 0.0
    events: int = 0


def make_small():
    """A small forum and base, short answers, no curves: a run of a second for this process."""
    parts = {part: forum.make_forum(0)[part][:n] for part, n in PARTS.items()}
    forum.make_forum = lambda seed: parts
    train.TINY_LLAMA = LlamaConfig(**SHAPE)
    compare = report.compare
    report.compare = lambda *args, **options: compare(*args, **options | {"max_new_tokens": 4})
    sys.modules["matplotlib"] = None
    importlib.import_module("torch._dynamo")  # two seconds, which a model on "meta" would take


def make_model(folder: Path) -> list[str]:
    """A model folder of the tests' shape and preference data: the flags that name them."""
    rows = forum.make_forum(0)
    (folder / "tokenizer").mkdir()
    threads = [row["text"] for row in rows["pretrain"]]
    train_tokenizer(threads, SHAPE["vocab_size"], folder / "tokenizer" / "tokenizer.model")
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SHAPE))
    save_llama(model, folder / "model", torch.float32, tokenizer_from=folder / "tokenizer")
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows["rl"]))
    return ["--model", str(folder / "model"), "--data", str(pairs)]


# What a run leaves.


def contents(path: Path):
    """A file of a run without what may differ between two equal runs."""
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]
    if path.name == "config.json" and "arguments" in path.read_text():
        record = json.loads(path.read_text())
        return record | {"process": 0, "arguments": record["arguments"] | {"resume": 0, "out": 0}}
    return path.read_bytes()


def differences(out: Path, expected: Path) -> list[str]:
    """What is missing, left over or different in a run's folder."""
    ours, theirs = (
        {p.relative_to(f): p for f in [d] for p in f.rglob("*")} for d in (out, expected)
    )
    wrong = [f"left over: {name}" for name in ours.keys() - theirs.keys()]
    wrong += [f"missing: {name}" for name in theirs.keys() - ours.keys()]
    for name in ours.keys() & theirs.keys():
        if ours[name].is_file() and contents(ours[name]) != contents(theirs[name]):
            wrong.append(f"different: {name}")
    return sorted(wrong)


def stage_of(out: Path, world: str) -> str:
    """The stage that a killed run was in."""
    if not (out / "config.json").exists():
        return "start"
    stages = [stage for stage in PRODUCTS if world != "--model" or stage != "pretrain"]
    return next((stage for stage in stages if not (out / PRODUCTS[stage]).exists()), "end")


def undisturbed(world: World, log: Path) -> list[str]:
    """Run a world once and keep its folder; returns what is wrong already."""
    began = time.monotonic()
    status = run([*world.flags, "--out", world.out], log)
    world.seconds = time.monotonic() - began
    if status:
        sys.exit(f"{world.name}: the undisturbed run ended with {status}\n{log.read_text()}")
    found = json.loads(log.with_suffix(".json").read_text())
    world.events = found["events"]
    left = [*(world.out / "state").iterdir(), *world.out.rglob(".*")]
    world.out.rename(world.expected)
    print(
        f"{world.name}: undisturbed {world.seconds:.1f} s, {world.events} file events", flush=True
    )
    wrong = [f"left over: {path.name}" for path in left]
    return wrong + [f"renamed before synced: {Path(path).name}" for path in found["unsynced"]]


def chain(world: World, rng: random.Random, log: Path, most: int):
    """Begin a run, kill it, resume it, perhaps kill it again: ([(kind, stage)], what is wrong)."""
    kills, resume = [], []
    shutil.rmtree(world.out, ignore_errors=True)
    while True:
        again = len(kills) < most and (not kills or rng.random() < 0.5)
        kind, number, moment = rng.choice(KINDS) if again else "", 0, 1e9
        if kind == "moment":
            moment = rng.uniform(0, world.seconds)
        elif kind:
            number = rng.randint(1, world.events)
        status = run([*world.flags, "--out", world.out, *resume], log, kind, number, moment)
        if status != -signal.SIGKILL:
            break
        kills.append((kind, stage_of(world.out, world.name)))
        resume = ["--resume"]
    if status:
        return kills, [f"exit status {status}: {log.read_text()[-2000:]}"]
    return kills, differences(world.out, world.expected)


def kill_and_resume(worlds, num_kills: int, seed: int, log: Path) -> bool:
    """Chains until there were so many kills; prints each and a table. Whether all went well."""
    rng, table, runs, wrong_runs = random.Random(seed), Counter(), Counter(), 0
    for world in worlds:
        for wrong in undisturbed(world, log):
            print(f"  WRONG {wrong}")
            wrong_runs += 1
    while sum(table.values()) < num_kills:
        world = worlds[sum(runs.values()) % len(worlds)]
        kills, wrong = chain(world, rng, log, num_kills - sum(table.values()))
        table.update((world.name, stage, kind) for kind, stage in kills)
        runs[world.name] += bool(kills)
        wrong_runs += bool(wrong)
        told = ", ".join(f"{stage} ({kind})" for kind, stage in kills) or "it was quicker"
        print(f"{sum(table.values()):4} kills, {world.name}: {told}", flush=True)
        for line in wrong:
            print(f"  WRONG {line}", flush=True)
    print(
        "\n| run | killed in | " + " | ".join(KINDS) + " |\n|---" + "|---" * (1 + len(KINDS)) + "|"
    )
    for name, stage in dict.fromkeys(
        (world.name, s) for world in worlds for s in ("start", *PRODUCTS, "end")
    ):
        row = [table[name, stage, kind] for kind in KINDS]
        if any(row):
            print(f"| {name} | {stage} | " + " | ".join(map(str, row)) + " |")
    print(f"\n{sum(table.values())} kills in {sum(runs.values())} runs; wrong: {wrong_runs}")
    return not wrong_runs


# Two at once.


def start_twice(world: World, rng: random.Random, log: Path, resume: bool) -> list[str]:
    """Start two processes on one folder, a new one or a killed run's; returns what is wrong."""
    shutil.rmtree(world.out, ignore_errors=True)
    flags = [*world.flags, "--out", world.out]
    if resume:
        while stage_of(world.out, world.name) not in ("sft", "dpo"):
            shutil.rmtree(world.out, ignore_errors=True)
            run(flags, log, "event", rng.randint(1, world.events))
        flags.append("--resume")
    first = start(flags, log)
    time.sleep(rng.choice([0, 0, 0.005, 0.05]))  # they have imported everything already
    both = [first, start(flags, log.with_name("other"))]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in both]
    said = [path.read_text() for path in (log, log.with_name("other"))]
    if sorted(statuses) != [0, 2]:
        return [f"exit statuses {statuses}: {said}"]
    *before, line = said[statuses.index(2)].splitlines()
    print(f"      {line}")
    if not line.startswith("error: ") or any("rror" in text for text in before):
        return [f"not one line: {line}"]
    return differences(world.out, world.expected)


def double_starts(world: World, num_starts: int, seed: int, log: Path) -> bool:
    """Start two at once, so many times, every second time with --resume. Whether all went well."""
    rng, num_wrong = random.Random(seed), 0
    num_wrong += bool(undisturbed(world, log))
    for number in range(1, num_starts + 1):
        resume = number % 2 == 0
        wrong = start_twice(world, rng, log, resume)
        num_wrong += bool(wrong)
        print(
            f"{number:4} double starts{', --resume' if resume else ''}: {wrong or 'one ran'}",
            flush=True,
        )
    print(f"\n{num_starts} double starts; wrong: {num_wrong}")
    return not num_wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0, help="how many kills")
    parser.add_argument("--starts", type=int, default=0, help="how many double starts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    good = True
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_small()
        flags = make_model(folder) + list(map(str, MODEL))
        model = World("--model", flags, folder / "run", folder / "expected")
        small = World("forum", list(map(str, FORUM)), folder / "forum", folder / "expected-forum")
        reuse = ["--reuse", small.expected, "--beta", "0.3"]
        again = World("--reuse", reuse, folder / "again", folder / "expected-again")
        if args.kills:
            worlds = (
                [small, model, again] if args.kills > 9 else [small, model]
            )  # quick in the suite
            good = kill_and_resume(worlds, args.kills, args.seed, folder / "log")
        if args.starts:
            shutil.rmtree(model.expected, ignore_errors=True)
            shutil.rmtree(model.out, ignore_errors=True)
            good = double_starts(model, args.starts, args.seed, folder / "log") and good
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
