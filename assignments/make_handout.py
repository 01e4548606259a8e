"""Make a new folder for students: the taught code with holes, visible tests, texts, no history.

    python assignments/make_handout.py OUT [--problems NAME ...] [--variant N]
        [--hold-back RUNG ...] [--open RUN] [--no-check]

Then it checks what it made: the reference gets full points, the empty handout gets none, and no
statement that was cut out is left anywhere in it.
"""

import argparse
import ast
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np

from grade import HERE, PACKAGE, Grader, cut, report
from grader.arrays import pack
from grader.source import body_of, distinctive, functions, statements
from problems.all_problems import NUMBERS, chosen, text_of
from problems.ladder import Problem, draw
from problems.variants import Variant, variant

PUBLIC_SEED = 2024  # of the inputs that students see
COPIED = ("train.py", "requirements.txt", "LICENSE")
CHECKERS = ("__init__.py", "agree.py", "arrays.py", "calls*.py")  # they know no answers
SUFFIXES = (".py", ".md", ".txt", ".json", ".toml")
NOTE = """> This is the tutorial of the full repository. Here `python train.py` runs once your
> problems are solved. The tests, figures, benchmarks and files of numbers that the text names are
> not in this folder.
"""


def make(out: Path, problems: list[Problem], v: Variant, hold_back=(), run: Path | None = None):
    """Write the handout into a folder that does not exist yet."""
    out.mkdir(parents=True)
    for path, text in cut(PACKAGE, problems).items():
        write(out / path, text)
    for name in COPIED:
        if (PACKAGE / name).exists():
            write(out / name, (PACKAGE / name).read_text("utf-8"))
    for path in sorted(p for pattern in CHECKERS for p in (HERE / "grader").glob(pattern)):
        write(out / "tests" / "grader" / path.name, path.read_text("utf-8"))
    write(out / "tests" / "test_problems.py", (HERE / "handout" / "visible.py").read_text("utf-8"))
    for problem in problems:
        write_checks(out / "tests" / "checks", problem, v, hold_back)
    write(out / "PROBLEMS.md", problem_texts(problems, v, run is not None))
    students = (HERE / "handout" / "STUDENTS.md").read_text("utf-8")
    files = ", ".join(f"`{path}`" for path in dict.fromkeys(f for p in problems for f in p.files))
    filled = {"table": table(problems), "count": str(len(problems)), "files": files}
    filled["points"] = str(sum(problem.points for problem in problems))
    filled["first"] = f"p{NUMBERS[problems[0].name]:02}"
    for name, text in filled.items():
        students = students.replace(f"{{{name}}}", text)
    write(out / "README.md", students)
    if (PACKAGE / "tutorial.md").exists():
        tutorial = (PACKAGE / "tutorial.md").read_text("utf-8")
        title, _, text = without_answers(tutorial, removed(problems)).partition("\n")
        write(out / "tutorial.md", f"{title}\n\n{NOTE}{text}")
    write(out / "pytest.ini", "[pytest]\naddopts = --tb=short\n")
    if run is not None:
        for name in ("base", "sft", "data"):
            shutil.copytree(run / name, out / "open" / name)


def write(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def write_checks(folder: Path, problem: Problem, v: Variant, hold_back):
    """Write a file per visible rung: its inputs from the public seed, and what is expected."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = draw(problem, v, PUBLIC_SEED)
    for n, check in enumerate(problem.checks):
        if not check.visible or check.rung in hold_back:
            continue
        with np.errstate(all="ignore"):
            expected = check.expect(inputs[check.rung], v)
        message = {f"in {name}": value for name, value in inputs[check.rung].items()}
        message |= {f"out {name}": value for name, value in expected.items()}
        message |= {"call": check.call, "said": check.said, "tolerance": check.tolerance}
        message |= {"banned": list(problem.banned), "shape only": check.rung == "shape"}
        name = f"p{NUMBERS[problem.name]:02}-{problem.name}-{n}-{check.rung.replace(' ', '_')}"
        (folder / name).write_bytes(pack(message))


def command_of(problem: Problem) -> str:
    """The command that runs a problem's visible tests."""
    return f"python -m pytest tests -k p{NUMBERS[problem.name]:02}"


def table(problems: list[Problem]) -> str:
    """A line per problem and file: number, file, functions, points, command."""
    lines = [
        "| problem | file | to write | points | its tests |",
        "| --- | --- | --- | --- | --- |",
    ]
    for problem in problems:
        for path, holes in problem.files.items():
            first = path == problem.file
            number = f"{NUMBERS[problem.name]}. {problem.title}" if first else ""
            names = ", ".join(f"`{hole}`" for hole in holes)
            command = f"`{command_of(problem)}`" if first else ""
            points = str(problem.points) if first else ""
            lines.append(f"| {number} | `{path}` | {names} | {points} | {command} |")
    return "\n".join(lines)


def problem_texts(problems: list[Problem], v: Variant, with_open: bool) -> str:
    """What each problem asks, with its ladder."""
    parts = ["# Problems\n"]
    for problem in problems:
        text = textwrap.fill(text_of(problem, v), 100, break_on_hyphens=False)
        parts.append(f"## {NUMBERS[problem.name]}. {problem.title}\n\n{text}\n")
        for check in problem.checks:
            parts.append(f"- {check.rung} ({check.points}): {check.said}")
        parts.append(f"\n`{command_of(problem)}`\n")
    if with_open:
        parts.append((HERE / "handout" / "open.md").read_text("utf-8"))
    return "\n".join(parts)


# --- no answer survives -----------------------------------------------------------------------


def removed(problems: list[Problem]) -> dict[str, int]:
    """The distinctive statements of what was cut out: {normalized line: number of its problem}."""
    found = {}
    for problem in problems:
        for path, names in (*problem.files.items(), *problem.helpers.items()):
            if not (PACKAGE / path).exists():
                continue
            nodes = functions(ast.parse((PACKAGE / path).read_text("utf-8")))
            for name in names:
                found |= dict.fromkeys(statements(body_of(nodes[name])), NUMBERS[problem.name])
    return {line: number for line, number in found.items() if distinctive(line)}


def bare(text: str) -> str:
    """Text without white space and with one kind of quotes."""
    return "".join(text.split()).replace('"', "'").replace(",)", ")")


def without_answers(markdown: str, answers: dict[str, int]) -> str:
    """Markdown in which a code block with a removed statement is replaced by a problem's number."""
    answers = {bare(line): number for line, number in answers.items()}
    kept, block = [], None
    for line in markdown.splitlines():
        fence = line.lstrip().startswith("```")
        if block is None and not fence:
            kept.append(line)
        elif block is None:
            block = [line]
        else:
            block.append(line)
            if fence:
                shown = [n for line, n in answers.items() if line in bare("\n".join(block))]
                kept += [f"*(Yours to write: problem {min(shown)}.)*"] if shown else block
                block = None
    return "\n".join([*kept, *(block or [])]) + "\n"


def survivors(out: Path, answers: set[str]) -> list[str]:
    """Where a removed statement can still be read: "file: statement"."""
    found = []
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.suffix in SUFFIXES):
        text = path.read_text("utf-8")
        if path.suffix == ".py":
            lines = statements([ast.parse(text)]) & answers
        else:
            lines = {line for line in answers if bare(line) in bare(text)}
        found += [f"{path.relative_to(out)}: {line}" for line in sorted(lines)]
    return found


def check(out: Path, problems: list[Problem], v: Variant) -> list[str]:
    """What is wrong with a handout; [] if it may be handed out."""
    from solutions import solved

    answers = removed(problems).keys() | solved.own_statements(problems)
    complaints = [f"an answer survives in {place}" for place in survivors(out, answers)]
    complaints += [f"{path} is there" for path in out.rglob(".git")]
    with Grader(v, PUBLIC_SEED + 1, problems) as grader, tempfile.TemporaryDirectory() as folder:
        empty = grader.grade(out)
        if any(row["score"] for row in empty):
            complaints.append(f"the empty handout scores:\n{report(empty)}")
        full = grader.grade(solved.write(Path(folder), solved.solution(v)))
        if any(row["score"] < row["max"] for row in full):
            complaints.append(f"the reference does not get all points:\n{report(full)}")
    return complaints


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--problems", nargs="+", help="names or numbers; all by default")
    parser.add_argument("--variant", type=int, default=0)
    parser.add_argument("--hold-back", nargs="+", default=(), help="rungs without visible tests")
    parser.add_argument("--open", type=Path, help="a run's folder (base/, sft/, data/)")
    parser.add_argument("--no-check", action="store_true")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} is there already: give a new folder")
    problems, v = chosen(args.problems), variant(args.variant)
    make(args.out, problems, v, args.hold_back, args.open)
    complaints = [] if args.no_check else check(args.out, problems, v)
    if complaints:
        sys.exit("\n".join(complaints))
    points = sum(problem.points for problem in problems)
    print(f"{args.out}: {len(problems)} problems, {points} points", end="")
    print("" if args.no_check else "; the reference gets all of them, the empty handout none")


if __name__ == "__main__":
    main()
