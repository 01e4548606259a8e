"""What a problem is: data for the handout and for the grader, and how answers are compared."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DRAWS = 4  # of which `draw` takes the best


@dataclass(frozen=True)
class Check:
    """One rung: inputs drawn from a seed, a call of the submission, what should come back.

    inputs(rng, variant) -> arguments of the call. expect(inputs, variant, bug) -> named arrays and
    plain values; with a bug's name, what that mistake gives. A rung named "shape" compares shapes
    alone and wants another answer for another draw. `said` is the feedback when it fails.
    """

    rung: str
    points: int
    call: str
    inputs: Callable[..., dict]
    expect: Callable[..., dict]
    said: str
    tolerance: float = 1e-5  # of the largest expected magnitude
    visible: bool = True  # whether students see it, with inputs of their own


@dataclass(frozen=True)
class Problem:
    """A hole to fill and its ladder. `bugs`: a usual mistake's name in the oracle: what to say."""

    name: str
    title: str
    file: str  # within the tree that students get
    holes: tuple[str, ...]
    text: str
    checks: tuple[Check, ...]
    bugs: dict[str, str]
    banned: tuple[str, ...] = ()
    helpers: tuple[str, ...] = ()  # removed too, since they give answers away; not graded
    changes: dict[str, str] = field(default_factory=dict)  # a variant's choice: what is asked
    seconds: int = 10
    more_holes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # in further files
    at_import: dict[str, str] = field(default_factory=dict)  # see source.guard_imports
    template: str | None = None  # a file of its own, not one of the package

    @property
    def points(self) -> int:
        return sum(check.points for check in self.checks)

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        """All its holes by file."""
        return {self.file: self.holes} | self.more_holes


def draw(problem: Problem, v, seed: int) -> dict[str, dict]:
    """The inputs of every check from the seed; the first rung has two draws.

    Of a few draws the best is taken, so that no grade hangs on the seed: now and then two products
    nearly cancel and rounding decides, or a mistake does no harm (RMSNorm's root where it is 1).
    """
    inputs = {}
    for check in problem.checks:
        for name in (check.rung, f"{check.rung} again")[: 1 + (check.rung == "shape")]:
            words = zlib.crc32(f"{problem.name}, {name}".encode())
            rng = np.random.default_rng([seed, words])
            draws = [check.inputs(rng, v) for _ in range(DRAWS)]
            inputs[name] = max(draws, key=lambda i, check=check: worth(problem, check, i, v))
    return inputs


def worth(problem: Problem, check: Check, inputs: dict, v) -> tuple[bool, int]:
    """(whether the answer stands far above roundings, how many mistakes would show clearly)."""
    with np.errstate(all="ignore"):
        expected = check.expect(inputs, v)
        shaky = agree(check.expect(shaken(inputs), v), expected, check.tolerance / 10)
        wrong = (check.expect(inputs, v, bug) for bug in problem.bugs)
        shown = sum(agree(answer, expected, 20 * check.tolerance) is not None for answer in wrong)
    return not shaky, shown


def shaken(inputs: dict) -> dict:
    """Float arrays with an error of the size of their own roundings."""
    rng = np.random.default_rng(0)

    def shake(value):
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            return value
        noise = rng.standard_normal(value.shape) * np.finfo(value.dtype).eps
        return value.astype(np.float64) * (1 + noise)

    return {name: shake(value) for name, value in inputs.items()}


def agree(got: dict, expected: dict, tolerance: float) -> str | None:
    """None if all that is expected is there, else the first difference, without the answer."""
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
    """Equality of plain values; tuples are lists, and 1 is not True."""
    if isinstance(wanted, (list, tuple)):
        return (
            isinstance(got, (list, tuple))
            and len(got) == len(wanted)
            and all(map(same, got, wanted))
        )
    return type(got) is type(wanted) and got == wanted


def right_shapes(first: dict, second: dict, expected: dict) -> str | None:
    """For the first rung: shapes as expected, finite, and the answer depends on the inputs."""
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


def normal(rng, *shape, dtype="float32"):
    """Standard normal numbers; float32 unless the check is about more digits."""
    return rng.standard_normal(shape).astype(dtype)


def wide(inputs: dict) -> dict:
    """Float arrays as float64, so that the oracle computes in double precision."""

    def widen(value):
        is_float = isinstance(value, np.ndarray) and value.dtype.kind == "f"
        return value.astype(np.float64) if is_float else value

    return {name: widen(value) for name, value in inputs.items()}


def only(inputs: dict, *names: str) -> dict:
    """Some of the inputs, wide, where they are there."""
    return wide({name: inputs[name] for name in names if name in inputs})
