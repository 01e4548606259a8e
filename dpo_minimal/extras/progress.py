"""A sign of life in long work: a line on stderr when the screen has been quiet for some seconds."""

import sys
import time

from dpo_minimal.extras import parallel

SECONDS = 5.0
last = [time.monotonic()]  # when something was last shown: one for all, as the screen is


def show(what: str, done: int, total: int, unit: str):
    """Print e.g. "reading: 120 of 272 modules" if nothing was shown for SECONDS; 0 begins anew."""
    now = time.monotonic()
    if done == 0:
        last[0] = now
    elif now - last[0] > SECONDS and parallel.first():
        last[0] = now
        print(f"          {what}: {done} of {total} {unit}", file=sys.stderr, flush=True)
