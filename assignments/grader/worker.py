"""The grader's other process: imports torch once, then forks a confined child for each problem.

    python -I -B worker.py        one JSON job per line on stdin, one JSON answer per line on stdout

It runs no code of a submission itself and knows no expected values. A child gets a folder with the
submission's module, a scratch folder and the inputs of its checks. Each check leaves a file of
arrays in `scratch/out`. When a child has ended, everything that it started is ended too.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

ROOMS = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOMS)  # `python -I` does not put the script's own folder there


def main():
    """Serve jobs until stdin ends."""
    from grader import calls, sandbox

    calls.warm_up()
    if sys.platform == "linux":
        sandbox.libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to this process
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(run_job(json.loads(line))) + "\n")
        answers.flush()


def run_job(job: dict) -> dict:
    """Fork, wait, clean up. Returns how the child ended and which layers confined it."""
    started = time.monotonic()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            run_child(job, write_end)
        finally:
            os._exit(1)
    os.close(write_end)
    status = wait(child, started + job["seconds"])
    end_all(child)
    with os.fdopen(read_end, "rb") as pipe:
        os.set_blocking(pipe.fileno(), False)
        layers = (pipe.read(1000) or b"").decode("ascii", "replace")
    return {"status": status, "layers": layers, "seconds": time.monotonic() - started}


def wait(child: int, deadline: float):
    """ "time" if it took too long, else its exit code, or minus the signal that ended it."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return "time"


def end_all(child: int):
    """End the child's group, then whatever it left behind, until nothing is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    while True:
        for orphan in children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> list[int]:
    """The processes whose parent is this one."""
    file = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(number) for number in file.read_text().split()] if file.exists() else []


def run_child(job: dict, report: int):
    """Confine this process, then run the checks one by one."""
    import grader
    from grader import calls, sandbox
    from grader.arrays import pack, unpack

    scratch, tree = Path(job["scratch"]), Path(job["tree"])
    messages = [Path(path).read_bytes() for path in job["inputs"]]
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.chdir(scratch)
    os.environ["HOME"] = os.environ["TMPDIR"] = str(scratch)
    prefixes = {Path(p).resolve() for p in (sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64")}
    readable = [tree, *prefixes, *map(Path, ("/etc/ld.so.cache", "/dev/urandom"))]
    layers = sandbox.confine(scratch, readable, job["seconds"], job["memory"])
    os.write(report, " ".join(layers).encode())
    os.closerange(3, 1024)
    sys.path[:] = [str(tree), *(p for p in sys.path if p != ROOMS)]
    grader.__path__ = []  # the submission can import nothing more of it
    for name, message in zip(job["checks"], messages, strict=True):
        result = run_check(calls, job, unpack(message))
        (scratch / "out" / name).write_bytes(pack(result))
    os._exit(0)


def run_check(calls, job: dict, inputs: dict) -> dict:
    """What a check's call returns, or {"error": ...} with the exception and its place."""
    try:
        return calls.run(inputs.pop("call"), inputs, job["banned"])
    except NotImplementedError:
        return {"error": "not implemented", "empty": True}
    except BaseException as error:  # also SystemExit: the child has other checks to run
        places = traceback.extract_tb(error.__traceback__)
        own = [
            f"{Path(p.filename).name}, line {p.lineno}" for p in places if job["tree"] in p.filename
        ]
        text = f"{type(error).__name__}: {error}"[:300]
        return {"error": text, "place": own[-1] if own else ""}


if __name__ == "__main__":
    main()
