"""The cases of replay.py that are about runs that end early: rows 8, 15 and 16."""

import json
import os
import shutil
import signal
import subprocess
import time

from replay import Case, Place, begin, end, ran, refused
from replay_cases import TRAIN, wait_for


def stop_cases() -> list[Case]:
    """All of them."""
    return damaged() + stopped() + the_rest()


# 8. Damaged states.


def interrupted(place: Place):
    """A run that is stopped in DPO, with its state."""
    process = begin(place.folder, [TRAIN, *long_dpo(place)])
    wait_for(place, process, "/9999  loss")
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
    names = "reference-*"
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
            wait_for(place, process, "/9999  loss")
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
        wait_for(place, process, "/9999  loss")
        process.kill()
        end(place.folder, process)
        words = ["--out", place.out, "--resume", "--max-steps", 9999]
        process = begin(place.folder, [TRAIN, *words])
        wait_for(place, process, "/9999  loss")
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
