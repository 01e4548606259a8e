"""A sign of life in long work: a line on stderr when the screen has been quiet for some seconds."""

import sys
import time
from contextlib import contextmanager
from functools import partial

from dpo_minimal.extras import parallel

SECONDS, LONGER = 5.0, 8.0
last = [time.monotonic()]  # when something was last shown: one for all, as the screen is


def show(what: str, done: int, total: int | None, unit: str, seconds: float = SECONDS):
    """Print e.g. "reading: 120 of 272 modules" if all was quiet for `seconds`; 0 starts anew."""
    now = time.monotonic()
    if done == 0:
        last[0] = now
    elif now - last[0] > seconds and parallel.first():
        last[0] = now
        so_far = f"{done} of {total}" if total else f"{done:,}"
        print(f"          {what}: {so_far} {unit}", file=sys.stderr, flush=True)


@contextmanager
def watched(blocks, compiled: bool):
    """Within the context, a model's blocks speak if nothing else has for LONGER seconds.

    A batch of a 7B model takes a minute on a CPU. Gradient checkpointing computes the blocks again
    in backward, from the last one to the first, so they speak there too.
    """
    hooks = []
    for i, block in enumerate(blocks, start=1) if not compiled else ():  # no hooks in a graph
        hooks.append(block.register_forward_pre_hook(partial(speak, i, len(blocks))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def speak(number: int, total: int, *module_and_values):
    """The hook of a block."""
    show("computing", number, total, "blocks", LONGER)


def duration(seconds: float) -> str:
    """A time as people say it: 48 s, 12 min, 3 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
