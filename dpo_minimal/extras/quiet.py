"""Imported first by a command: Ctrl-C while Python loads the packages is a word, no traceback."""

import os
import signal
import sys
from pathlib import Path

COMMANDS = ("train", "generate", "evaluate", "plot", "demo")


def stop(number, frame):
    """End at once: packages turn an interrupt in the middle of their import into other errors."""
    print("stopped", file=sys.stderr, flush=True)
    os._exit(130)


def loaded():
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Not where a test or a notebook imports a command, nor where Ctrl-C is ignored, as under nohup.
is_command = Path(sys.argv[0]).stem in COMMANDS
if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)
