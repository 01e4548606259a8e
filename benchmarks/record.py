"""What the scripts of benchmarks/ and figures/ share: flags, child processes, logs, results.

The scripts in this folder import it as `record`, those in figures/ as `benchmarks.record`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

TRAIN = Path(__file__).parents[1] / "train.py"
PACKAGES = ("torch", "numpy", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
# Flags that say where things are on this machine, or what a child process is asked to do.
NOT_RECORDED = ("scratch", "json", "out", "side", "report")


def script_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose --help keeps the line breaks of the description."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=raw)


def python_command(*words) -> list[str]:
    """The command that runs Python with these words: a script and its flags."""
    return [sys.executable, *map(str, words)]


def run_script(*words, **options):
    """Run a script in a process of its own, with options of `subprocess.run`. Raise if it fails."""
    subprocess.run(python_command(*words), check=True, **options)


def read_log(path) -> dict[str, tuple[list[dict], list[dict]]]:
    """A metrics.jsonl as {stage: (lines of its steps, lines of its evaluations)}.

    The prefix `eval_` is removed, so that a metric has the same name in both.
    """
    stages = {}
    for line in Path(path).read_text("utf-8").splitlines():
        row = json.loads(line)
        short = {name.removeprefix("eval_"): value for name, value in row.items()}
        is_evaluation = short.keys() != row.keys()
        stages.setdefault(row["stage"], ([], []))[is_evaluation].append(short)
    return stages


def in_turn(sides: list, number: int) -> list:
    """The order of the sides in a round: every second one goes backwards.

    So a machine that slows down favours no side.
    """
    return sides if number % 2 == 0 else sides[::-1]


def spread(values) -> dict[str, float]:
    """The median of some values, the smallest and the largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# --- results ----------------------------------------------------------------------------------


def save(args, result: dict):
    """If --json is given, write the result there, with the machine and the settings."""
    if args.json:
        made = {"machine": machine_record(), "settings": settings_record(args)}
        write_result(args.json, made | result)


def write_result(path, data: dict):
    """Write a result as JSON, one line per entry, and print where it is."""
    lines = [f"{json.dumps(str(name))}: {json.dumps(value)}" for name, value in data.items()]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    print(f"wrote {path}", flush=True)


def settings_record(args) -> dict:
    """The flags as they go into a result. Only the name of a model or data path is kept."""
    settings = {k: v for k, v in vars(args).items() if k not in NOT_RECORDED}
    names = {k: Path(settings[k]).name for k in ("model", "data", "against") if settings.get(k)}
    return settings | names


def machine_record() -> dict:
    """Where and when a result was made: processor, cores, GPU, versions, command line, date."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    # An absolute path means nothing on another machine, but its last part does.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    return {
        "cpu": cpu_name(),
        "cores": len(affinity),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "versions": versions,
        "command": "python " + shlex.join(words),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """The name of the processor as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
