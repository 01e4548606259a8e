"""What every command line needs: numbers that are checked, and errors in one line."""

import argparse
import math
import os
import sys

from dpo_minimal import InputError
from dpo_minimal.extras import quiet


def whole(low: int, high: int = 2**20):
    """An argparse type: a whole number from low to high."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.removeprefix("-").isdecimal() or len(text) > 20:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number")
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return int(text)

    return parse


def real(above: float = -math.inf, low: float = -math.inf, below: float = math.inf, high=1e9):
    """An argparse type: a finite number in these bounds; `above` and `below` are excluded."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None
        if not (above < value < below and low <= value <= high):
            bounds = {"above": above, "at least": low, "below": below, "at most": high}
            wanted = [f"{name} {bound:g}" for name, bound in bounds.items() if math.isfinite(bound)]
            raise argparse.ArgumentTypeError(f"{text[:40]} is not {' and '.join(wanted)}")
        return value

    return parse


def temperature(text: str) -> float:
    """An argparse type: 0, or so large that a logit divided by it is finite."""
    value = real(low=0, high=1e3)(text)
    if 0 < value < 1e-3:
        raise argparse.ArgumentTypeError(f"{text[:40]} is above 0 and below 0.001")
    return value


def words(text: str) -> str:
    """An argparse type: a text that is not empty, as $VARIABLE is if it was never set."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not text in UTF-8") from None
    if not text.strip():
        raise argparse.ArgumentTypeError("its text is empty")
    return text


def refuse(message: str):
    """For a parser's `error`: raise an InputError instead of printing the usage."""
    raise InputError(message)


def run_command(main):
    """Run a command line: bad input or a system's refusal is one line and exit status 2."""
    quiet.loaded()
    try:
        main()
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush
        raise SystemExit(0) from None
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            error = InputError(f"{error.filename or 'the system'}: {error.strerror or error}")
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        raise SystemExit(130) from None
