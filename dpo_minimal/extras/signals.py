"""Ctrl-C, SIGTERM and a closed terminal: the running step is finished, and its state saved.

A second signal stops at once.
"""

import signal
import sys
import threading
from contextlib import contextmanager

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


@contextmanager
def caught():
    """Within the context, gives a list that the first signal enters; a second one interrupts."""
    asked = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return

    def handle(number, frame):
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    wanted = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
