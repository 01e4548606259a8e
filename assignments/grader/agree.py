"""Compare what came back with what is expected, and say in words how they differ."""

from typing import Any

import numpy as np


def agree(got: dict, expected: dict, tolerance: float) -> str | None:
    """None if all that is expected came back, else the first difference, without the answer."""
    for name, wanted in expected.items():
        if name not in got:
            return f"{name} did not come back"
        difference = differ(got[name], wanted, tolerance)
        if difference:
            return f"{name} {difference}"
    return None


def differ(got: Any, wanted: Any, tolerance: float) -> str | None:
    """How a value differs from the expected one, in words, or None."""
    if not isinstance(wanted, np.ndarray):
        if isinstance(got, np.ndarray):
            return "is an array, not a plain value"
        return None if same(got, wanted) else f"is {str(got)[:60]}"
    if not isinstance(got, np.ndarray):
        return f"is {str(got)[:40]}, not an array"
    if got.shape != wanted.shape:
        return f"has the shape {list(got.shape)}, not {list(wanted.shape)}"
    if wanted.dtype.kind in "bu" and got.dtype != wanted.dtype:
        return f"has the dtype {got.dtype}, not {wanted.dtype}"
    with np.errstate(all="ignore"):
        a, b = got.astype(np.float64), wanted.astype(np.float64)
        if not np.isfinite(a).all():
            return "has entries that are not finite"
        error = np.abs(a - b)
        largest = np.abs(b).max(initial=0.0)
        if (error <= tolerance * largest).all():
            return None
        wrong = np.mean(error > tolerance * max(largest, 1e-300))
    if not np.abs(a).max(initial=0.0) and largest:
        return "is all zeros"
    return f"is wrong in {wrong:.0%} of its entries (by up to {error.max() / (largest or 1):.1e})"


def same(got: Any, wanted: Any) -> bool:
    """Whether plain values are equal. A tuple may equal a list, but 1 is not True."""
    if isinstance(wanted, (list, tuple)):
        return (
            isinstance(got, (list, tuple))
            and len(got) == len(wanted)
            and all(map(same, got, wanted))
        )
    return type(got) is type(wanted) and got == wanted


def right_shapes(first: dict, second: dict, expected: dict) -> str | None:
    """For the rung "shape": shapes are right, entries finite, and the inputs make a difference."""
    for name, wanted in expected.items():
        if not isinstance(wanted, np.ndarray):
            difference = differ(first.get(name), wanted, 0)
        else:
            got = first.get(name)
            difference = "did not come back as an array"
            if isinstance(got, np.ndarray):
                difference = None
                if got.shape != wanted.shape:
                    difference = f"has the shape {list(got.shape)}, not {list(wanted.shape)}"
                elif not np.isfinite(got.astype(np.float64)).all():
                    difference = "has entries that are not finite"
                elif np.array_equal(got, second.get(name)):
                    difference = "is the same whatever the inputs are"
        if difference:
            return f"{name} {difference}"
    return None
