"""One run at a time in a run's folder: a lock on the folder, which the process's end frees."""

import functools
import os

from dpo_minimal import InputError
from dpo_minimal.extras.reading import read_json

try:
    import fcntl
except ImportError:  # Windows has no locks on folders
    fcntl = None


@functools.cache  # keeps the lock, and asks only once per process
def hold(folder):
    """Hold the lock until this process ends, however it ends; InputError if another one has it."""
    if fcntl is None:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            f"{folder}: {holder(folder)} is at work here; give --out another folder"
        ) from None


def holder(folder) -> str:
    """Who holds the lock, as its config.json says."""
    if (folder / "config.json").exists():
        process = read_json(folder / "config.json").get("process")
        if isinstance(process, dict):
            return f"process {process.get('id')} on {process.get('host')}"
    return "another run"
