"""The cases of replay.py that are about runs: rows 1 to 3, 8, 15 and 16; it imports the others."""

import json
import os
import re
import shutil
import signal
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

    cases = not_finite() + two_at_once() + system_says_no() + damaged() + stopped() + the_rest()
    return sorted(cases + input_cases(), key=lambda case: case.row)


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
        if path.suffix == ".safetensors" and not path.name.startswith("reference-"):
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
        wait_for(place, "step    2")
        other = place.folder / "other"
        other.mkdir()
        done = launch(other, [TRAIN, *long, "--resume"])
        process.kill()
        end(place.folder, process)
        return done, refused(done, f"process {process.pid}")

    return [Case(2, "two seeds at once", seeds), Case(2, "--resume of a running run", resumed)]


def wait_for(place: Place, text: str):
    """Wait until a process has printed something."""
    for _ in range(6000):
        if text in (place.folder / "out").read_text():
            return
        time.sleep(0.02)
    raise TimeoutError(text)


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

    def full_disk(megabytes, words=""):
        def try_it(place):
            disk = mounted(place, f"size={megabytes}m")
            try:
                flags = place.flags("--out", disk / "run", *words.split())
                done = place.train(*flags, env={"TMPDIR": str(disk)})
                wrong = refused(done, "No space left")
                subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
                return done, wrong or ran(place.train(*flags, "--resume"))
            finally:
                subprocess.run(["umount", "-l", str(disk)], check=True)

        return Case(3, f"a disk of {megabytes} MB {words}, --resume after it grew", try_it)

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

    sizes = [600, 3000, 9000, 30_000, 80_000]
    disks = [full_disk(0.01), full_disk(0.05), full_disk(0.1), full_disk(0.2)]
    more = [Case(3, "a read-only disk", read_only), Case(3, "a full TMPDIR, the forum", full_tmp)]
    return [small_files(size) for size in sizes] + disks + more


def mounted(place: Place, options: str) -> Path:
    """A disk of its own; only root may mount one."""
    disk = place.folder / "disk"
    disk.mkdir()
    if "size=0." in options:
        options = f"size={int(float(options[5:-1]) * 1024)}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)])
    if done.returncode:
        raise Skip("needs root")
    return disk


# 8. Damaged states.


def interrupted(place: Place):
    """A run that is stopped in DPO, with its state."""
    process = begin(place.folder, [TRAIN, *long_dpo(place)])
    wait_for(place, "dpo      step    2")
    process.send_signal(signal.SIGTERM)
    return end(place.folder, process)


def long_dpo(place: Place):
    """So many steps that a signal comes in between: the log shows a line every two seconds."""
    return place.flags("--stage", "dpo", "--no-sft", "--max-steps", 9999, "--epochs", 9999)


def damaged():
    def cut(data):
        return data[: len(data) // 2]

    def flip(data):
        return (
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        )

    damages = {"cut off": cut, "empty": lambda d: b"", "foreign": lambda d: b"hello " * 99}

    def case(pattern, kind, change, finish=False):
        def try_it(place):
            if finish:  # a run that lost its DPO again, so that the reference's values are read
                ran(place.train(*place.flags()))
                shutil.rmtree(place.out / "dpo"), shutil.rmtree(place.out / "merged")
                flags = place.flags("--resume")
            else:
                interrupted(place)
                flags = ["--out", place.out, "--resume"]
            path = next(place.out.glob(pattern))
            path.write_bytes(change(path.read_bytes()))
            done = place.train(*flags)
            return done, refused(done, path.name)

        return Case(8, f"{pattern} is {kind}", try_it)

    cases = [case("state/dpo.pt", kind, change) for kind, change in damages.items()]
    cases.append(case("state/dpo.pt", "changed in one bit", flip))
    cases += [case("config.json", kind, change) for kind, change in damages.items()]
    names = "reference-*.safetensors"
    cases += [case(names, kind, change, finish=True) for kind, change in damages.items()]
    cases.append(Case(8, "metrics.jsonl with broken rows: they are dropped", broken_log))
    return cases + [
        other_data("reversed", lambda x: x[::-1]),
        other_data("shorter", lambda x: x[1:]),
    ]


def broken_log(place):
    done = place.train(*place.flags("--stage", "sft"))
    log = place.out / "metrics.jsonl"
    log.write_text("[]\n3\n" + log.read_text() + '{"stage": "s')
    done = place.train(*place.flags("--resume", "--stage", "dpo"))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return done, ran(done) or ("" if all("step" in row for row in rows) else "broken rows stayed")


def other_data(kind, change):
    def try_it(place):
        interrupted(place)
        rows = place.data.read_text().splitlines()
        place.data.write_text("\n".join(change(rows)) + "\n")
        done = place.train("--out", place.out, "--resume")
        return done, refused(done, "the data changed")

    return Case(8, f"the data are {kind} at --resume", try_it)


# 15. Signals and pipes.


def stopped():
    def early(place):
        process = begin(place.folder, [TRAIN, *place.flags()], real=True)
        time.sleep(0.7)  # torch is being imported
        process.send_signal(signal.SIGINT)
        done = end(place.folder, process)
        return done, ran(done, status=done.status) or ("" if done.status else "it went on")

    def within(name):
        def try_it(place):
            process = begin(place.folder, [TRAIN, *long_dpo(place)])
            wait_for(place, "dpo      step    1")
            process.send_signal(getattr(signal, name))
            done = end(place.folder, process)
            saved = (place.out / "state" / "dpo.pt").exists()
            return done, ran(done, "--resume goes on", 130) or ("" if saved else "no state")

        return Case(15, f"{name} within a stage", try_it)

    def pipe(place):
        head = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        process = begin(place.folder, [TRAIN, *place.flags()], stdout=head.stdin)
        head.stdin.close()
        done = end(place.folder, process)
        head.wait()
        return done, ran(done) or ("" if not done.err else "it said something")

    cases = [within(name) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    return [Case(15, "Ctrl-C during the imports", early), *cases, Case(15, "| head -1", pipe)]


# 16. Odd files; a run that is finished.


def the_rest():
    def finished(place):
        place.train(*place.flags())
        done = place.train(*place.flags("--resume"))
        return done, ran(done, "is finished")

    def unsaved(place):
        process = begin(place.folder, [TRAIN, *long_dpo(place), "--save-every", 0])
        wait_for(place, "dpo      step    1")
        process.kill()
        end(place.folder, process)
        words = ["--out", place.out, "--resume", "--max-steps", 9999]
        process = begin(place.folder, [TRAIN, *words])
        wait_for(place, "dpo      step    1")
        process.kill()
        done = end(place.folder, process)
        return done, ran(done, "no saved state: begins anew", -signal.SIGKILL)

    def here(place):
        flags = ["--model", ".", "--data", place.data, "--max-steps", 1, "--max-length", 96]
        done = place.train(*flags, cwd=place.model)
        made = (place.model / "runs" / "model" / "config.json").exists()
        return done, ran(done) or ("" if made else "not in runs/model")

    def fifo(place):
        place.data.unlink()
        os.mkfifo(place.data)
        done = place.train(*place.flags())
        return done, refused(done)

    def endless(place):
        done = place.train(*place.flags("--data", "/dev/zero"))
        return done, refused(done)

    def left_state(place):
        place.train(*place.flags("--stage", "sft"))
        (place.out / "state" / "sft.pt").write_bytes(b"")
        done = place.train(*place.flags("--resume", "--stage", "dpo"))
        left = [p.name for p in (place.out / "state").iterdir()]
        return done, ran(done) or ("" if not left else f"left over: {left}")

    names = {
        "a finished run, --resume": finished,
        "killed before the first save, --resume": unsaved,
        "--model .": here,
        "--data is a FIFO": fifo,
        "--data /dev/zero": endless,
        "a state that a kill left behind": left_state,
    }
    return [Case(16, name, try_it) for name, try_it in names.items()]
