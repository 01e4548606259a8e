"""What a problem is (data for the handout and for the grader), and how its inputs are drawn."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from grader.agree import agree

DRAWS = 4  # of which `draw` takes the best


@dataclass(frozen=True)
class Check:
    """One rung: inputs drawn from a seed, a call of the submission, what should come back.

    inputs(rng, variant) -> arguments of the call. expect(inputs, variant, bug) -> named arrays and
    plain values; with a bug's name, what that mistake gives. The rung "shape" compares shapes only,
    and wants another answer for other inputs. `said` is the feedback if the rung is missed.
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
    """A hole to fill and its ladder. `bugs`: {a usual mistake's name in the oracle: feedback}."""

    name: str
    title: str
    file: str  # within the tree that students get
    holes: tuple[str, ...]
    text: str
    checks: tuple[Check, ...]
    bugs: dict[str, str]
    banned: tuple[str, ...] = ()
    changes: dict[str, str] = field(default_factory=dict)  # {a variant's choice: what is asked}
    seconds: int = 10
    more_holes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # in further files
    # By file, what is cut out too, since it gives answers away; nobody needs to write it.
    helpers: dict[str, tuple[str, ...]] = field(default_factory=dict)
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
    """Draw the inputs of every check from the seed; those of the rung "shape" twice.

    The best of a few draws is taken, so that no grade depends on the seed. Now and then two
    products nearly cancel and rounding decides, or a mistake does no harm (RMSNorm without its
    root, where the root is 1).
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
    """(whether the answer is far above rounding errors, how many mistakes would show clearly)."""
    with np.errstate(all="ignore"):
        expected = check.expect(inputs, v)
        shaky = agree(check.expect(shaken(inputs), v), expected, check.tolerance / 10)
        wrong = (check.expect(inputs, v, bug) for bug in problem.bugs)
        shown = sum(agree(answer, expected, 20 * check.tolerance) is not None for answer in wrong)
    return not shaky, shown


def shaken(inputs: dict) -> dict:
    """The inputs with a rounding error added to every float array."""
    rng = np.random.default_rng(0)

    def shake(value):
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            return value
        noise = rng.standard_normal(value.shape) * np.finfo(value.dtype).eps
        return value.astype(np.float64) * (1 + noise)

    return {name: shake(value) for name, value in inputs.items()}


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
    """Those of the named inputs that are there, as float64."""
    return wide({name: inputs[name] for name in names if name in inputs})
