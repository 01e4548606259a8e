"""The cases of replay.py that are about runs: rows 1 to 3; it imports the others."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import torch
from kill import make_model, make_small
from replay import Case, Done, Place, Skip, begin, end, launch, ran, refused

from dpo_minimal.checkpoint import load_llama, save_adapter, save_llama
from dpo_minimal.files import read_sealed
from dpo_minimal.formats.safetensors import open_safetensors
from dpo_minimal.lora import add_adapter

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "train.py"


def place_maker(folder: Path):
    """A function that makes the place of the case of a number."""
    make_small()  # of use only to copies of this process, not with --real
    make_model(folder)

    def make(number: int) -> Place:
        place = Place(
            folder / f"{number}", folder / f"{number}" / "model", folder / f"{number}.jsonl"
        )
        shutil.copytree(folder / "model", place.model)
        shutil.copy(folder / "pairs.jsonl", place.data)
        return place

    return make


def all_cases() -> list[Case]:
    """Every case, by row."""
    from replay_inputs import input_cases
    from replay_stops import stop_cases
    from replay_weights import weight_cases

    cases = not_finite() + two_at_once() + system_says_no()
    cases += stop_cases() + input_cases() + weight_cases()
    return sorted(cases, key=lambda case: case.row)


def flag_case(row: int, words: str, says: str = "") -> Case:
    """A flag that must be refused."""
    return Case(
        row, words, lambda place: with_verdict(place.train(*place.flags(*words.split())), says)
    )


def with_verdict(done: Done, says: str = "") -> tuple[Done, str]:
    return done, refused(done, says)


# 1. Numbers that are not finite.


def non_finite_files(folder: Path) -> str:
    """The files of a run that hold a number that is not finite; NaN in a table means unknown."""
    wrong = []
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        if path.name.startswith("reference-"):
            continue
        if path.suffix == ".safetensors":
            tensors = [t.read() for t in open_safetensors(path).values()]
        elif path.suffix == ".pt":
            raw = read_sealed(path)
            (folder / "raw").write_bytes(raw)
            state = torch.load(folder / "raw", weights_only=True)
            moments = [v for s in state["optimizer"]["state"].values() for v in s.values()]
            tensors = [*state["trained"].values(), *moments]
        elif path.suffix in (".json", ".jsonl"):
            wrong += [path.name] if re.search(r"\b(NaN|Infinity)\b", path.read_text()) else []
            continue
        else:
            continue
        if not all(torch.as_tensor(t).isfinite().all() for t in tensors):
            wrong.append(path.name)
    return f"not finite: {', '.join(wrong)}" if wrong else ""


def not_finite():
    flags = ["--learning-rate 1e30", "--beta nan", "--beta inf", "--lora-alpha nan"]

    def flag(words):
        def try_it(place):
            done = place.train(*place.flags(*words.split()))
            return done, refused(done) or non_finite_files(place.folder)

        return Case(1, words, try_it)

    def huge(place):  # within the bounds of the flags, and too much for the arithmetic
        words = "--learning-rate 1 --beta 1e9 --lora-alpha 1e9 --max-steps 40 --epochs 99"
        done = place.train(*place.flags(*words.split()))
        unclear = ran(done) and refused(done)  # either will do, if what it leaves is finite
        return done, unclear or non_finite_files(place.out)

    def weight(value):
        def try_it(place):
            model = load_llama(place.model, quantize=None)
            model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = value
            save_llama(model, place.model, torch.float32, tokenizer_from=keep_tokenizer(place))
            done = place.train(*place.flags())
            return done, refused(done, "up_proj") or non_finite_files(place.out)

        return Case(1, f"a weight is {value}, --save-every 1", try_it)

    def adapter(place):
        model = load_llama(place.model)
        add_adapter(model, "sft", r=2)
        save_adapter(model, ["sft"], place.folder / "adapter")
        file = place.folder / "adapter" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
        done = place.train(*place.flags("--sft-adapter", file.parent))
        return done, refused(done, "NaN") or non_finite_files(place.out)

    more = [Case(1, "rates and scales of 1 and 1e9", huge), weight(float("nan"))]
    more += [weight(float("inf")), Case(1, "a NaN in --sft-adapter", adapter)]
    return [flag(words) for words in flags] + more


def keep_tokenizer(place: Place) -> Path:
    """A copy of the model's tokenizer, to write the folder anew."""
    return Path(shutil.copytree(place.model, place.folder / "tokenizer"))


# 2. Two in one folder.


def two_at_once():
    def seeds(place):
        other = place.folder / "other"
        other.mkdir()
        first = begin(place.folder, [TRAIN, *place.flags()])
        second = begin(other, [TRAIN, *place.flags("--seed", 1)])
        both = sorted([end(place.folder, first), end(other, second)], key=lambda d: d.status)
        rows = (place.out / "metrics.jsonl").read_text().count('"loss"')
        wrong = "" if rows == 6 else f"{rows} steps were logged"
        return both[1], ran(both[0]) or refused(both[1]) or wrong

    def resumed(place):
        long = place.flags("--max-steps", 9999, "--epochs", 9999)
        process = begin(place.folder, [TRAIN, *long])
        wait_for(place, process, "/9999  loss")
        other = place.folder / "other"
        other.mkdir()
        done = launch(other, [TRAIN, *long, "--resume"])
        process.kill()
        end(place.folder, process)
        return done, refused(done, f"process {process.pid}")

    return [Case(2, "two seeds at once", seeds), Case(2, "--resume of a running run", resumed)]


def wait_for(place: Place, process, text: str):
    """Wait until a process has printed something; the log has a line every two seconds."""
    for _ in range(3000):
        if text in (place.folder / "out").read_text():
            return
        time.sleep(0.02)
    process.kill()
    raise TimeoutError(f"{text!r} was not printed")


# 3. The system says no.


def system_says_no():
    import resource

    def small_files(size):
        def try_it(place):
            limit = (resource.RLIMIT_FSIZE, (size, size))
            done = place.train(*place.flags(), limits=[limit])
            left = [p.name for p in place.out.rglob("*.partial")]
            wrong = refused(done, "File too large") or (f"left over: {left}" if left else "")
            return done, wrong or ran(place.train(*place.flags("--resume")))

        return Case(3, f"ulimit -f: {size} bytes, then --resume without", try_it)

    def full_disk(kilobytes):
        def try_it(place):
            disk = mounted(place, f"size={kilobytes}k")
            try:
                flags = place.flags("--out", disk / "run")
                done = place.train(*flags, env={"TMPDIR": str(disk)})
                wrong = refused(done, "No space left")
                subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
                return done, wrong or ran(place.train(*flags, "--resume"))
            finally:
                subprocess.run(["umount", "-l", str(disk)], check=True)

        return Case(3, f"a disk of {kilobytes} KB, --resume after it grew", try_it)

    def read_only(place):
        disk = mounted(place, "ro")
        try:
            done = place.train(*place.flags("--out", disk / "run"))
            return done, refused(done, "Read-only")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)

    def full_tmp(place):
        disk = mounted(place, "size=4k")
        try:
            words = ["--out", place.out, "--max-steps", 1]
            done = place.train(*words, env={"TMPDIR": str(disk)})
            return done, refused(done)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)

    sizes = [600, 3000, 9000, 30_000]
    disks = [full_disk(kilobytes) for kilobytes in (12, 24, 52, 72)]
    more = [Case(3, "a read-only disk", read_only), Case(3, "a full TMPDIR, the forum", full_tmp)]
    return [small_files(size) for size in sizes] + disks + more


def mounted(place: Place, options: str) -> Path:
    """A disk of its own; only root may mount one."""
    disk = place.folder / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)])
    if done.returncode:
        raise Skip("needs root")
    return disk
