"""The list of all problems, in order. Each is defined in a chapter; students see `N. title`."""

from problems import (
    chapter_adapters,
    chapter_bits,
    chapter_by_hand,
    chapter_losses,
    chapter_network,
    chapter_quantize,
    chapter_training,
)
from problems.ladder import Problem
from problems.variants import Variant

PROBLEMS: tuple[Problem, ...] = (
    *chapter_network.PROBLEMS,
    chapter_bits.CODE,
    *chapter_quantize.PROBLEMS,
    chapter_bits.MATMUL,
    *chapter_adapters.PROBLEMS,
    *chapter_losses.PROBLEMS,
    *chapter_by_hand.PROBLEMS,
    *chapter_training.PROBLEMS,
)
NUMBERS = {problem.name: n for n, problem in enumerate(PROBLEMS, start=1)}


def chosen(names: list[str] | None) -> list[Problem]:
    """The problems with these names or numbers, or all of them; KeyError for an unknown one."""
    known = {p.name: p for p in PROBLEMS} | {
        str(n): p for p, n in zip(PROBLEMS, NUMBERS.values(), strict=True)
    }
    if not names:
        return list(PROBLEMS)
    wanted = {known[name].name for name in names}
    return [problem for problem in PROBLEMS if problem.name in wanted]


def text_of(problem: Problem, v: Variant) -> str:
    """What students are told, with the variant's choices filled in."""
    axes = {"layout": v.rotary, "code": v.code, "lora": v.lora, "loss": v.loss, "mask": v.mask}
    axes["by_hand"] = v.loss
    changes = {name: problem.changes.get(choice, "") for name, choice in axes.items()}
    return problem.text.format(**changes).strip()
