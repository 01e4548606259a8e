"""The tutorial is executed: excerpts, numbers, figures, commands and names are those of the tree.

Its markings: a python block whose first line is a comment with a file's name is a piece of that
file, verbatim but for the indentation; a number that links to `figures/results/x.json#a:b` is that
value of that file, rounded as it is written (in %, MB or GB of it); a figure is drawn from the
JSON file of its name.
"""

import hashlib
import json
import re
import shlex
import textwrap
from functools import cache
from pathlib import Path

import pytest

from dpo_minimal import InputError
from dpo_minimal.extras import ask
from dpo_minimal.run import make_parser

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "tutorial.md").read_text("utf-8")


def blocks(text, language):
    """The contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def wrong_excerpts(text):
    """First lines of python blocks that are not a piece of the file that they name."""
    wrong = []
    for block in blocks(text, "python"):
        name, *lines = block.rstrip("\n").split("\n")
        path = ROOT / name.removeprefix("# ")
        source = path.read_text("utf-8").split("\n") if path.is_file() else []
        runs = (source[i : i + len(lines)] for i in range(len(source) - len(lines) + 1))
        wanted = textwrap.dedent("\n".join(lines))
        if not any(textwrap.dedent("\n".join(run)) == wanted for run in runs):
            wrong.append(f"{name}: {lines[0]}")
    return wrong


@cache
def result(file):
    """A JSON file of results."""
    return json.loads((ROOT / file).read_text("utf-8"))


def number_in(file, place):
    """The value at a:b:0:c of a JSON file."""
    value = result(file)
    for key in place.split(":"):
        if isinstance(value, dict) and key not in value:
            key = key.replace("_", " ")  # a link has no spaces
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def wrong_numbers(text):
    """Marked numbers that are not those of their JSON file."""
    wrong = []
    for shown, file, place in re.findall(r"\[([^\]]+)\]\(([\w/.-]+\.json)#([^)]+)\)", text):
        try:
            value = number_in(file, place)
        except (OSError, KeyError, IndexError, ValueError, TypeError):
            wrong.append(f"{shown}: no {file}#{place}")
            continue
        digits, unit = re.fullmatch(r"([-+\d.,]+)( GB| MB|%)?", shown).groups()
        digits = digits.replace(",", "").lstrip("+")
        decimals = len(digits.partition(".")[2])
        value /= {" GB": 1e9, " MB": 1e6, "%": 0.01}.get(unit, 1)
        if f"{value:.{decimals}f}" != digits:
            wrong.append(f"{shown}: {file}#{place} is {value}")
    return wrong


OF_RUNS = {"figures/demo.png": "dpo_minimal.demo", "figures/plots-two.png": "dpo_minimal.plot"}


def wrong_figures(text):
    """Figures that are missing, or were not drawn from the JSON file of their name.

    A picture of a run has no such file; the text must name the command that makes it.
    """
    wrong = []
    for figure in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        path = ROOT / figure
        if path.is_file() and OF_RUNS.get(figure, "nothing of that") in text:
            continue
        data = ROOT / "figures" / "results" / f"{path.stem}.json"
        if not path.is_file() or not data.is_file():
            wrong.append(figure)
        elif hashlib.sha256(data.read_bytes()).hexdigest() not in path.read_text("utf-8"):
            wrong.append(f"{figure} is not drawn from {data.name}")
    return wrong


def missing_names(text):
    """Files, tests and links of the text that are not there."""
    quoted = re.findall(r"`([\w./-]+)`", text)
    files = {q for q in quoted if re.search(r"\w/[\w/]*\w\.(py|md|json)$|^\w+\.(py|md|txt)$", q)}
    files |= {q.rstrip("/") for q in quoted if re.match(r"(dpo_minimal|tests|figures|bench)", q)}
    links = re.findall(r"\]\((?!https?:)([\w/-]+\.\w+)", text)
    known = "\n".join(path.read_text("utf-8") for path in ROOT.glob("tests/**/*.py"))
    tests = {q for q in quoted if q.startswith("test_") and "." not in q}
    made = {"eval.json", "samples.md", "metrics.jsonl"}  # a run's own
    missing = [f for f in sorted(files | set(links)) if not (ROOT / f).exists() and f not in made]
    missing = [f for f in missing if not list(ROOT.glob(f"dpo_minimal/{f}"))]
    return missing + [name for name in sorted(tests) if f"def {name}(" not in known]


def commands(text):
    """The lines of the bash blocks, as words."""
    return [shlex.split(line) for block in blocks(text, "bash") for line in block.splitlines()]


def wrong_commands(text):
    """Commands that the tree does not understand."""
    return [" ".join(words) for words in commands(text) if not understood(words)]


def understood(words):
    """Whether a command's program is there and takes these flags."""
    if words[0] == "torchrun":
        words = ["python", *words[words.index("train.py") :]]
    if words[:2] == ["python", "train.py"]:
        return parses(make_parser(""), words[2:])
    if words[:3] == ["python", "-m", "dpo_minimal.generate"]:
        return parses(ask.make_parser(), words[3:])
    if words[0] == "pytest":
        return all((ROOT / w.split("::")[0]).exists() for w in words[1:] if not w.startswith("-"))
    if words[0] == "python":
        script = ROOT / words[1]
        flags = [word for word in words[2:] if word.startswith("--")]
        folder = "\n".join(path.read_text("utf-8") for path in script.parent.glob("*.py"))
        return script.is_file() and all(f'"{flag}"' in folder for flag in flags)
    return words[:2] == ["pip", "install"]


def parses(parser, arguments):
    """Whether an argparse parser takes these arguments."""
    try:
        parser.parse_args(arguments)
    except (SystemExit, InputError):
        return False
    return True


CHECKS = [wrong_excerpts, wrong_numbers, wrong_figures, missing_names, wrong_commands]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_tutorial_agrees_with_the_tree(check):
    assert check(TEXT) == []


def test_the_numbers_and_figures_of_the_readme_are_those_of_their_json_files():
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count(".json#") > 5 and "![" in text
    assert wrong_numbers(text) == [] and wrong_figures(text) == []


def test_the_checks_have_something_to_check():
    assert len(blocks(TEXT, "python")) > 10 and len(commands(TEXT)) > 5
    assert TEXT.count(".json#") > 20 and TEXT.count("![") > 5


CHANGES = [
    (wrong_excerpts, "delta = chosen_logratios - rejected_logratios", "delta = 0"),
    (wrong_excerpts, "# dpo_minimal/loss.py", "# dpo_minimal/lose.py"),
    (wrong_numbers, r"\[(\d\.\d+)\]\((figures/results/)", r"[7.77](\2"),
    (wrong_numbers, r"\.json#\w+", ".json#nothing"),
    (wrong_figures, r"!\[([^\]]*)\]\(figures/\w+", r"![\1](figures/nothing"),
    (missing_names, "`tests/test_loss.py`", "`tests/test_lose.py`"),
    (missing_names, "`test_the_gradient", "`test_no_gradient"),
    (wrong_commands, "bash\npython train.py --model", "bash\npython train.py --modle"),
    (wrong_commands, "pytest tests/test_bugs.py", "pytest tests/bugs_test.py"),
]


@pytest.mark.parametrize("check, old, new", CHANGES)
def test_a_change_is_noticed(check, old, new):
    changed = re.sub(old, new, TEXT, count=1)
    assert changed != TEXT and check(changed) != []


def test_the_tutorial_is_under_12_000_words():
    assert len(TEXT.split()) < 12_000
