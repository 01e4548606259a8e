"""Variants: what is asked differently, since the taught code and its answers are public.

A variant's number is read as digits, one per axis; 0 is the taught code. Every other number below
COUNT asks for something else. The oracles and the texts of the problems follow it.
"""

from dataclasses import dataclass, fields

AXES = {
    "rotary": ("halves", "interleaved"),
    "code": ("NF4", "NF3", "mirrored"),
    "loss": ("sigmoid", "ipo", "cdpo", "robust"),
    "lora": ("alpha/r", "alpha/sqrt(r)"),
    "mask": ("answer", "skip first", "no EOS"),
}
COUNT = 2 * 3 * 4 * 2 * 3


@dataclass(frozen=True)
class Variant:
    """One choice on each axis; without arguments the taught code."""

    rotary: str = "halves"
    code: str = "NF4"
    loss: str = "sigmoid"
    lora: str = "alpha/r"
    mask: str = "answer"

    @property
    def changes(self) -> list[str]:
        """The axes on which it departs from the taught code."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]


def variant(number: int) -> Variant:
    """The variant of a number from 0 (the taught code) to COUNT - 1."""
    if not 0 <= number < COUNT:
        raise ValueError(f"variants go from 0 to {COUNT - 1}, not {number}")
    chosen = {}
    for axis, choices in AXES.items():
        number, digit = divmod(number, len(choices))
        chosen[axis] = choices[digit]
    return Variant(**chosen)


def number_of(**chosen: str) -> int:
    """The number of the variant with these choices, the taught ones elsewhere."""
    number = 0
    for axis in reversed(AXES):
        digit = AXES[axis].index(chosen.get(axis, AXES[axis][0]))
        number = number * len(AXES[axis]) + digit
    return number
