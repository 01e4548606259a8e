"""Imported first by a command: Ctrl-C while Python loads the packages is a word, no traceback."""

import sys


def say(kind, error, trace):
    """An excepthook: a word for Ctrl-C, and for everything else what there was before."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        before(kind, error, trace)


before, sys.excepthook = sys.excepthook, say
