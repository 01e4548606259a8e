"""A process that runs train.py and is killed: at a moment, or at one of its file events."""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import train
from dpo_minimal.extras.command_line import run_command

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR


def die(path=None, flags=0):
    """SIGKILL this process; with a path, after some bytes of what it was about to write."""
    if path is not None:
        os.write(os.open(path, flags), b'{"stage": "dpo", "step": 1')
    os.kill(os.getpid(), signal.SIGKILL)


def watch(kind: str, number: int, found: dict):
    """Count this process's file events, and die at the event of that number.

    found: "events" counts them; "unsynced" lists files that were renamed before they were synced.
    """
    fsync, synced, dying = os.fsync, set(), []

    def count(path=None, flags=0):
        found["events"] += 1
        if found["events"] == number:
            dying.append(True)
            die(path if kind == "half-written" else None, flags)

    def hook(name, args):
        if dying:
            return
        if name == "open" and isinstance(args[0], (str, Path)) and args[2] & WRITING:
            synced.discard(str(args[0]))
            count(args[0], args[2])
        elif name in EVENTS:
            count()
        if name == "os.rename":
            source = Path(args[0])
            files = [p for p in (source, *source.rglob("*")) if p.is_file()]
            found["unsynced"] += [str(p) for p in files if str(p) not in synced]
            synced.update(str(args[1] / p.relative_to(source)) for p in files)

    def counted_fsync(handle):
        count()
        fsync(handle)
        synced.add(os.readlink(f"/proc/self/fd/{getattr(handle, 'fileno', lambda: handle)()}"))

    os.fsync = counted_fsync
    sys.addaudithook(hook)


def start(flags, log: Path, kind: str = "", number: int = 0) -> int:
    """Fork a process that runs train.py with these flags; returns its id.

    Everything is imported already, so it begins at once. It writes its output to `log`, and to
    `log`.json what `watch` found.
    """
    pid = os.fork()
    if pid:
        return pid
    status, found = 1, {"events": 0, "unsynced": []}
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1), os.dup2(handle, 2)
        signal.alarm(300)  # a run that hangs is ended, and fails
        sys.argv = ["train.py", *map(str, flags)]
        watch(kind, number, found)
        run_command(train.main)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        log.with_suffix(".json").write_text(json.dumps(found))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def run(flags, log: Path, kind: str = "", number: int = 0, moment: float = 1e9) -> int:
    """Run train.py and kill it at an event or after some seconds: the exit status, or -9."""
    pid, began = start(flags, log, kind, number), time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - began > moment:
            os.kill(pid, signal.SIGKILL)
            moment = 1e9
        time.sleep(0.002)
