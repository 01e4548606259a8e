"""The tutorial is executed: excerpts, programs, numbers, figures, commands, names are the tree's.

Its markings: a python block whose first line is a comment with a file's name is a piece of that
file, or of the function or class named beside it, verbatim but for the indentation. Other python
blocks are programs, and a text block below one is what it prints. `[shown][name]` is a number, and
`[name]: FILE.json "a:b"`, at the end of the text, says where it is from: from that place of that
file, or "computed: ..." here. A table or a json block is followed by a comment `<!-- from FILE ...
-->` that says where its cells are from. The README's numbers are marked in the same way. All
are rounded as they are written (in %, MB or GB of the value).
"""

import ast
import contextlib
import hashlib
import io
import json
import math
import re
import shlex
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch

from dpo_minimal import InputError
from dpo_minimal.extras import ask
from dpo_minimal.nf4 import NF4_VALUES
from dpo_minimal.run import make_parser

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "tutorial.md").read_text("utf-8")


def blocks(text, language):
    """The contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


# --- code -------------------------------------------------------------------------------------


EXCERPT = r"# ([\w/]+\.py)(?:: ([\w.]+))?\n"


def is_excerpt(block):
    """Whether a python block is a piece of a file, and no program."""
    return re.match(EXCERPT, block)


def lines_of(file, name):
    """The lines of a file, or of the function or class in it that is called so ("A.f")."""
    path = ROOT / file
    source = path.read_text("utf-8") if path.is_file() else ""
    node = ast.parse(source)
    for part in name.split(".") if name else ():
        inside = [child for child in node.body if getattr(child, "name", "") == part]
        if not inside:
            return []
        node = inside[0]
    lines = source.split("\n")
    return lines[node.lineno - 1 : node.end_lineno] if name else lines


def wrong_excerpts(text):
    """First lines of python blocks that are not a piece of what they name."""
    wrong = []
    for block in filter(is_excerpt, blocks(text, "python")):
        head, *lines = block.rstrip("\n").split("\n")
        source = lines_of(*re.match(EXCERPT, block).groups())
        runs = (source[i : i + len(lines)] for i in range(len(source) - len(lines) + 1))
        wanted = textwrap.dedent("\n".join(lines))
        if not any(textwrap.dedent("\n".join(run)) == wanted for run in runs):
            wrong.append(f"{head}: {lines[0]}")
    return wrong


def wrong_programs(text):
    """What programs print that is not in the text block below them, if there is one.

    Numbers may differ by one in their last digit: machines round.
    """
    program = r"^```python\n(?!# [\w/]+\.py[:\n])(.*?)^```\n(?:\n```text\n(.*?)^```)?"
    found, wrong = re.findall(program, text, re.M | re.S), []
    printed = what_they_print(tuple(code for code, _ in found))
    for (_, shown), said in zip(found, printed, strict=True):
        wrong += differences(shown.split(), said.split())
    return wrong


@cache
def what_they_print(programs):
    """What each program prints; all run in one namespace."""
    said, names = [], {}
    for code in programs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "tutorial.md", "exec"), names)  # noqa: S102
        said.append(printed.getvalue())
    return said


def differences(shown, printed):
    """The words that differ, where numbers may be one off in their last digit."""
    if len(shown) != len(printed):
        return [f"{len(shown)} words shown, {len(printed)} printed: {' '.join(printed)}"]
    wrong = []
    for a, b in zip(shown, printed, strict=True):
        if not re.fullmatch(r"-?\d+\.\d+", a) or not re.fullmatch(r"-?\d+\.\d+", b):
            same = a == b
        else:
            same = abs(float(a) - float(b)) < 1.5 * 10.0 ** -len(a.partition(".")[2])
        wrong += [] if same else [f"{a}: {b} is printed"]
    return wrong


# --- numbers ----------------------------------------------------------------------------------


@cache
def result(file):
    """A JSON file of results."""
    return json.loads((ROOT / file).read_text("utf-8"))


def value_at(file, place):
    """The value at a:b:0:c of a JSON file."""
    value = result(file)
    for key in place.split(":"):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def complaint(shown, file, place):
    """[] if what is shown is the value at a place of a file, rounded as it is shown; else why."""
    try:
        value = COMPUTED[place]() if place in COMPUTED else value_at(file, place)
    except (OSError, KeyError, IndexError, ValueError, TypeError):
        return [f"{shown}: no {file} {place}"]
    if isinstance(value, str):
        return [] if shown.strip("`") == value else [f"{shown}: {file} {place} is {value}"]
    number = re.fullmatch(r"([-+]?[\d.,]+)( GB| MB|%)?", shown)
    if not number:
        return [f"{shown}: {file} {place} is the number {value}"]
    digits, unit = number.groups()
    digits = digits.replace(",", "").lstrip("+")
    decimals = len(digits.partition(".")[2])
    value /= {" GB": 1e9, " MB": 1e6, "%": 0.01}.get(unit, 1)
    wrong = f"{value:.{decimals}f}" != digits
    return [f"{shown}: {file} {place} is {value}"] if wrong else []


def wrong_numbers(text):
    """Numbers that are not those of the places that they link to."""
    wrong = []
    sources = dict(re.findall(r'^\[([\w-]+)\]: (\S+ ".+")$', text, re.M))
    used = set()
    for shown, name in re.findall(r"\[([^\]]+)\]\[([\w-]+)\]", text):
        used.add(name)
        if name in sources:
            file, _, place = sources[name].partition(" ")
            wrong += complaint(shown, file, place.strip('"'))
        else:
            wrong.append(f"[{shown}][{name}] has no source")
    return wrong + [f"[{name}] is not used" for name in sorted(sources.keys() - used)]


def tables(text):
    """(cells of the rows below its head, comment) of each table with a comment on its source."""
    found = re.findall(r"((?:^\|[^\n]*\n)+)\n?<!-- from (.*?)-->", text, re.M | re.S)
    for table, comment in found:
        lines = table.splitlines()[2:]
        yield [[c.strip() for c in line.strip("|").split(" | ")] for line in lines], comment


def parts(comment, name, after="$"):
    """The entries behind a word in a comment, separated by |."""
    entries = re.search(rf"\b{name} (.*?)\s*{after}", comment, re.S).group(1)
    return [" ".join(entry.split()) for entry in entries.split("|")]


def wrong_tables(text):
    """Cells of tables that are not the values that the comments below them name.

    A row's name stands for * in a column's name, or before it. `text` is a column that is not
    checked, `a to b` one with a range. The first column may be without a source: it has names.
    """
    wrong = []
    for cells, comment in tables(text):
        file = comment[: comment.index("\nrows")]
        rows, columns = parts(comment, "rows", r"\ncolumns"), parts(comment, "columns")
        cells = [line[-len(columns) :] for line in cells]  # without the names of the rows
        if len(rows) != len(cells) or any(len(line) != len(columns) for line in cells):
            wrong.append(f"{comment}: {len(rows)} x {len(columns)} are not the table's sizes")
            continue
        for row, line in zip(rows, cells, strict=True):
            for column, cell in zip(columns, line, strict=True):
                wrong += [] if column == "text" else wrong_cell(cell, file, row, column)
    return wrong


def wrong_cell(cell, file, row, column):
    """[] if a cell of a table is right, else why."""
    names, shown = column.split(" to "), cell.split(" to ")
    if len(names) != len(shown):
        return [f"{cell} is not {column}"]
    places = [name.replace("*", row) if "*" in name else f"{row}:{name}" for name in names]
    return sum((complaint(*pair) for pair in zip(shown, [file] * 9, places)), [])  # noqa: B905


def wrong_json(text):
    """json blocks that are not what the comments below them name."""
    wrong = []
    found = re.findall(r"^```json\n(.*?)^```\n\n<!-- from (\S+) (.*?) -->", text, re.M | re.S)
    if len(found) != len(blocks(text, "json")):
        wrong.append("a json block says not where it is from")
    for block, file, place in found:
        if not (ROOT / file).exists() or json.loads(block) != value_at(file, place):
            wrong.append(f"{file} {place} is not {block[:40]}")
    return wrong


def spoken(name):
    """(true score, KL) of a policy of closed_form.json as it speaks."""
    found = result("figures/results/closed_form.json")["sampled"][name]
    return found["sampled_true_score"], found["sampled_kl"]


def frontier_at(kl):
    """The frontier's score at a KL, on new questions, between its points."""
    points = result("figures/results/closed_form.json")["held_out"]["frontier"]
    points = sorted((point["kl"], point["score"]) for point in points)
    for (x, y), (right, top) in zip(points, points[1:], strict=False):
        if x <= kl <= right:
            return y + (top - y) * (kl - x) / (right - x)
    raise ValueError(f"no frontier at KL {kl}")


def spoken_share(name):
    """The share of the gain of a policy as it speaks."""
    start = value_at("figures/results/closed_form.json", "held_out:reference:score")
    score, kl = spoken(name)
    return (score - start) / (frontier_at(kl) - start)


def of_its_kind(when, trained=(True, False)):
    """How many votes of the kind of one_pair.json's have a positive delta."""
    deltas = value_at("figures/results/one_pair.json", f"{when}:deltas_of_its_kind")
    return sum(
        delta > 0 and was in trained for delta, was in zip(deltas, were_trained(), strict=True)
    )


def were_trained():
    """For each vote of the kind, whether it was among the votes of "after 100 steps"."""
    rows = value_at("figures/results/one_pair.json", "rows_of_its_kind")
    count = value_at("figures/results/one_pair.json", "after 100 steps:votes")
    return [row < count for row in rows]


def error_of_garbled():
    """The standard error of a share that was measured on 60 answers."""
    file = "figures/results/closed_form.json"
    p = value_at(file, "sampled:DPO 1:sampled_share_garbled")
    return math.sqrt(p * (1 - p) / 60)


COMPUTED = {
    f"computed: {name}": value
    for name, value in {
        "votes of the pair's kind raised by one step": lambda: of_its_kind("after one step"),
        "votes of the pair's kind trained on": lambda: sum(were_trained()),
        "trained votes of the pair's kind right after 100 steps": lambda: of_its_kind(
            "after 100 steps", trained=[True]
        ),
        "other votes of the pair's kind right after 100 steps": lambda: of_its_kind(
            "after 100 steps", trained=[False]
        ),
        "ln 15 per token": lambda: (
            math.log(15) / value_at("figures/results/length.json", "mean_tokens")
        ),
        "standard error of DPO 1's garbled share": error_of_garbled,
        "frontier at DPO 1's sampled KL": lambda: frontier_at(spoken("DPO 1")[1]),
        "share of the gain as DPO 1 speaks": lambda: spoken_share("DPO 1"),
        "share of the gain as certain votes speak": lambda: spoken_share(
            "DPO 1, every vote certain"
        ),
        "standard error of 50 choices, in points": lambda: 100 * math.sqrt(0.5 * 0.5 / 50),
    }.items()
}


# --- exercises --------------------------------------------------------------------------------


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def tilt(reference, rewards, beta=1.0):
    """The optimum (2)."""
    products = [p * math.exp(r / beta) for p, r in zip(reference, rewards, strict=True)]
    return [p / sum(products) for p in products]


def llama_7b():
    """Parameters of Llama 2 7B."""
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    return 2 * 32000 * 4096 + 32 * block + 4096


def best_beta(delta):
    """Where beta sigmoid(-beta delta) is largest, to four digits."""
    return max(range(1, 50_000), key=lambda b: b / 1e4 * sigmoid(-b / 1e4 * delta)) / 1e4


def one_pair(*path):
    """A value of one_pair.json."""
    return value_at("figures/results/one_pair.json", ":".join(path))


BOTH = ("chosen", "rejected")


def pair_sum(answer, where=slice(None)):
    """The sum of an answer's log-probabilities before tuning, of some tokens."""
    logps = one_pair("before", "token_logps", "policy", answer)
    return sum(logps[where]) if isinstance(where, slice) else sum(logps[i] for i in where)


def changed_entries(*answers):
    """Places of the pair's mask that change if its answers change places."""
    masks = []
    for order in (answers, answers[::-1]):
        names = [name for name in ("prompt", *order) for _ in one_pair("tokens", name, "ids")]
        masks.append(
            [
                j <= i and name in ("prompt", names[i])
                for i in range(len(names))
                for j, name in enumerate(names)
            ]
        )
    return sum(a != b for a, b in zip(*masks, strict=True))


def pair_mean(answer):
    return pair_sum(answer) / len(one_pair("tokens", answer, "ids"))


def nearest_codes(x):
    """The two NF4 values nearest to x and how far off they are."""
    a, b = sorted(NF4_VALUES, key=lambda code: abs(code - x))[:2]
    return [a, abs(a - x), b, abs(b - x)]


@cache
def names_of_programs():
    """What the programs of part I define."""
    names = {}
    programs = [block for block in blocks(TEXT, "python") if not is_excerpt(block)]
    with contextlib.redirect_stdout(io.StringIO()):
        for program in programs[:3]:
            exec(compile(program, "tutorial.md", "exec"), names)  # noqa: S102
    return names


@cache
def some_votes_on_d(steps):
    """The probability of D if a hundredth of the votes compare it with A."""
    names, p = names_of_programs(), sigmoid(2)
    votes = 0.99 * names["votes4"]
    votes[0, 3], votes[3, 0] = 0.01 * p, 0.01 * (1 - p)
    return float(names["tune"](names["reference4"], votes, steps)[3])


# What an answer must show, in its order: (how it is written, the value).
ANSWERS = {
    "1.1": lambda: [("{:.3f}", p) for p in tilt([0.6, 0.3, 0.1], [0, 1, 2], 0.5)],
    "1.2": lambda: [("{:.3f}", 1 / math.log(6))],
    "1.3": lambda: [
        ("{:.3f}", entropy(sigmoid(1))),
        ("{:.3f}", entropy(sigmoid(2))),
        ("{:.3f}", (2 * entropy(sigmoid(1)) + entropy(sigmoid(2))) / 3),
    ],
    "2.1": lambda: [("{:.3f}", p) for p in tilt([0.54, 0.27, 0.09, 0.10], [0.0, 1.0, 2.0, -2.0])],
    "2.3": lambda: [("{:.3f}", some_votes_on_d(300)), ("{:.3f}", some_votes_on_d(3000))],
    "3.1": lambda: [
        ("{:.3f}", 0.3 * 1 + 0.1 * 2),
        ("{:.3f}", math.log(0.6 + 0.3 * math.e + 0.1 * math.e**2)),
    ],
    "4.2": lambda: [("{:.4f}", entropy(0.8))],
    "4.3": lambda: [("{:,}", 32_000 - 1), ("{:,}", 32_000 - 2)],
    "5.1": lambda: [("{:.2f}", best_beta(2))],
    "7.1": lambda: [("{:.3f}", pair_sum("chosen")), ("{:.3f}", pair_sum("chosen", (0, 6, 8)))],
    "7.2": lambda: [
        ("{:.4f}", -math.log(sigmoid(0.1 * one_pair("after 100 steps", "delta")))),
        ("{:.4f}", 0.1 * sigmoid(-0.1 * one_pair("after 100 steps", "delta"))),
    ],
    "7.3": lambda: [
        ("{:.3f}", pair_sum("chosen")),
        ("{:.3f}", pair_sum("rejected")),
        ("{:.3f}", pair_sum("rejected") - pair_sum("chosen")),
        ("{:.3f}", pair_mean("chosen")),
        ("{:.3f}", pair_mean("rejected")),
        ("{:.3f}", pair_mean("rejected") - pair_mean("chosen")),
    ],
    "7.4": lambda: [("{}", changed_entries("chosen", "rejected"))],
    "8.1": lambda: [("{:,}", llama_7b())],
    "8.4": lambda: [("{:.3f}", x / math.sqrt((9 + 16) / 2)) for x in (3, 4)],
    "9.2": lambda: [("{:.2f}", math.sqrt(2) / 2)],
    "10.1": lambda: [("{}", " ".join(f"{16 * i + i + 1:02x}" for i in range(0, 16, 2)))],
    "10.2": lambda: [("{:.3f}", 4 + 8 / 32 + 32 / (32 * 256))],
    "10.3": lambda: [("{:.4f}", x) for x in nearest_codes(0.5)],
    "11.1": lambda: [("{}", 0.07), ("{:.3f}", math.log(1 / 2 * 1 / 5 * 7 / 10))],
    "12.1": lambda: [("{:.1f}", 2 * 32 * 2 * 8 * (4096 + 4096) / 1e6)],
    "13.1": lambda: [("{:.1f}", 100 * math.sqrt(0.15 * 0.85 / n)) for n in (120, 60)],
    "15.1": lambda: [
        ("{:.3f}", sigmoid(-3)),
        ("{:.0f}", 3 / 0.1),
        ("{:.0f}", 1 / (2 * 0.1)),
        ("{:.3f}", math.log(0.9 / 0.1)),
    ],
    "18.1": lambda: [
        ("{:.0f}%", 100 * 31 / 50),
        ("{:.1f}", 100 * math.sqrt(0.25 / 50)),
        ("{:.1f}", (31 / 50 - 0.5) / math.sqrt(0.25 / 50)),
    ],
}


def exercises(text):
    """({number: question}, {number: answer})."""
    questions, _, answers = text.partition("## Answers to the exercises")
    item = r"\*\*(\d+\.\d+)\*\* (.*?)(?=\n\n|\n- |\Z)"
    return dict(re.findall(item, questions, re.S)), dict(re.findall(item, answers, re.S))


def wrong_answers(text):
    """Exercises without stars or a chapter, answers without a question, or with a wrong number."""
    asked, answered = exercises(text)
    wrong = [f"{number} has no stars" for number, q in asked.items() if q[:3] != "(\\*"]
    wrong += [f"{number} was not asked" for number in answered if number not in asked]
    for number, values in ANSWERS.items():
        answer = answered.get(number, "")
        for form, value in values():
            shown, found, answer = answer.partition(form.format(value))
            if not found:
                wrong.append(f"{number} does not say {form.format(value)}")
                break
    return wrong


def by_hand():
    """Numbers of the text that are worked out by hand: (how it is written, the value)."""
    for name, p, r in zip("ABC", [0.6, 0.3, 0.1], [0.0, 1.0, 2.0], strict=True):
        product, z = p * math.exp(r), 0.6 + 0.3 * math.e + 0.1 * math.e**2
        yield f"| {name} | {p} | {math.exp(r):.3f} | {product:.3f} | {{:.3f}} |", product / z
    yield "product / {:.3f} |", z
    yield r"$\sigma(2) = {:.0f}\%$", 100 * sigmoid(2)
    yield r"$\sigma(1) = {:.0f}\%$", 100 * sigmoid(1)
    yield "policy would give it {:.3f}", tilt([0.54, 0.27, 0.09, 0.10], [0.0, 1.0, 2.0, -2.0])[3]
    yield r"\sigma(0.2) = {:.4f}$", sigmoid(0.2)
    yield "0.2}}) = {:.4f}$", math.log(1 + math.exp(-0.2))
    yield r"\sigma(-0.2) = {:.4f}$", 0.1 * sigmoid(-0.2)
    yield r"\log 2 = {:.6f}$", math.log(2)
    yield "That is {:.0f} GB.", 16 * llama_7b() / 1e9
    yield "2 bytes each, {:.1f} GB", 2 * llama_7b() / 1e9
    yield "{:.1f} million trainable", 32 * 2 * 8 * (4096 + 4096) / 1e6
    yield "{:.2f}% of its weights", 100 * 32 * 2 * 8 * (4096 + 4096) / llama_7b()
    yield r"256) = {:.3f}$", 4 + 8 / 64 + 32 / (64 * 256)
    yield "has {:,} weights in linear layers", 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    yield "and {:,} in embedding and head", 2 * 32000 * 4096


def wrong_by_hand(text):
    """Numbers worked out by hand that the text does not have."""
    words = " ".join(text.split())
    wanted = [form.format(value) for form, value in by_hand()]
    return [number for number in wanted if number not in words]


def wrong_problems(text):
    """Problems of the assignments that the exercises name and that are not there."""
    there = (ROOT / "assignments" / "README.md").read_text("utf-8")
    numbers = set(re.findall(r"\bP(\d+)\b", text))
    return [f"P{n}" for n in sorted(numbers) if not re.search(rf"^\| {n} \|", there, re.M)]


# --- figures, names, commands -----------------------------------------------------------------


OF_RUNS = {"figures/demo.png": "dpo_minimal.demo", "figures/plots-two.png": "dpo_minimal.plot"}


def wrong_figures(text):
    """Figures that are missing, or that nothing vouches for.

    An experiment's holds the sha256 of the JSON file of its name, one of figures/pictures.py says
    so (and has a test of its own), a picture of a run is in a text that names the command.
    """
    wrong = []
    for figure in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        path = ROOT / figure
        if path.is_file() and OF_RUNS.get(figure, "nothing of that") in text:
            continue
        data = ROOT / "figures" / "results" / f"{path.stem}.json"
        if not path.is_file():
            wrong.append(figure)
        elif data.is_file():
            if hashlib.sha256(data.read_bytes()).hexdigest() not in path.read_text("utf-8"):
                wrong.append(f"{figure} is not drawn from {data.name}")
        elif "made by figures/pictures.py" not in path.read_text("utf-8"):
            wrong.append(f"{figure}: where is it from?")
    return wrong


def missing_names(text):
    """Files, tests and links of the text that are not there."""
    quoted = re.findall(r"`([\w./-]+)`", text)
    files = {
        q for q in quoted if re.search(r"\w/[\w/]*\w\.(py|md|json|ipynb)$|^\w+\.(py|md|txt)$", q)
    }
    files |= {q.rstrip("/") for q in quoted if re.match(r"(dpo_minimal|tests|figures|bench)", q)}
    links = re.findall(r"\]\((?!https?:)([\w/-]+\.\w+)", text)
    known = "\n".join(path.read_text("utf-8") for path in ROOT.glob("tests/**/*.py"))
    tests = {q for q in quoted if q.startswith("test_") and "." not in q}
    made = {"eval.json", "samples.md", "metrics.jsonl"}  # a run's own
    missing = [f for f in sorted(files | set(links)) if not (ROOT / f).exists() and f not in made]
    folders = ("dpo_minimal", "figures")
    missing = [f for f in missing if not any((ROOT / folder / f).exists() for folder in folders)]
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


def wide_lines(text):
    """Lines above 100 characters, other than rows of tables, links' sources, figures, commands."""
    kept = re.sub(r"^```bash\n.*?^```", "", text, flags=re.M | re.S)
    free = (r"\|", r"\[[\w-]+\]: ", r"!\[")
    lines = [line for line in kept.splitlines() if len(line) > 100]
    return [line for line in lines if not any(re.match(start, line) for start in free)]


# --- the tests --------------------------------------------------------------------------------


CHECKS = [
    *(wrong_excerpts, wrong_programs, wrong_numbers, wrong_tables, wrong_json, wrong_answers),
    *(wrong_by_hand, wrong_problems, wrong_figures, missing_names, wrong_commands, wide_lines),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_tutorial_agrees_with_the_tree(check):
    assert check(TEXT) == []


def test_the_numbers_and_figures_of_the_readme_are_those_of_their_json_files():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(re.findall(r"\]\[[\w-]+\]", text)) > 10 and "![" in text
    assert wrong_numbers(text) == [] and wrong_figures(text) == []


def test_the_checks_have_something_to_check():
    excerpts = [block for block in blocks(TEXT, "python") if is_excerpt(block)]
    assert len(excerpts) > 10 and len(blocks(TEXT, "python")) - len(excerpts) >= 5
    assert len(blocks(TEXT, "text")) >= 5 and len(commands(TEXT)) > 5
    assert len(re.findall(r"^\[[\w-]+\]: ", TEXT, re.M)) > 20 and TEXT.count("![") > 10
    assert len(list(tables(TEXT))) > 8 and len(blocks(TEXT, "json")) >= 3
    assert len(exercises(TEXT)[0]) > 30 and len(exercises(TEXT)[1]) >= len(ANSWERS)


def test_no_word_is_left_to_be_written():
    assert "TODO" not in TEXT


def test_the_program_lands_on_the_closed_form_and_leaves_the_fourth_answer_free():
    # The tutorial's own functions, against (2) by hand: to 1e-3 with expected votes.
    names = names_of_programs()
    found = names["tune"](names["reference"], names["votes"])
    expected = torch.tensor(tilt([0.6, 0.3, 0.1], [0.0, 1.0, 2.0]))
    assert (found - expected).abs().max() < 1e-3
    # h is -1, 0, 1 for A, B, C, and D's logit stays: 0.1 of 0.54 / e + 0.27 + 0.09 e + 0.1.
    tuned = names["tune"](names["reference4"], names["votes4"])
    assert float(tuned[3]) == pytest.approx(0.1 / (0.54 / math.e + 0.37 + 0.09 * math.e), abs=1e-4)


CHANGES = [
    (wrong_excerpts, "delta = chosen_logratios - rejected_logratios", "delta = 0"),
    (wrong_excerpts, "# dpo_minimal/loss.py", "# dpo_minimal/lose.py"),
    (wrong_excerpts, "loss.py: dpo_loss", "loss.py: ipo_loss"),
    (wrong_excerpts, "py: Attention.forward", "py: Attention.backward"),
    (wrong_programs, r"optimum      0.279", "optimum      0.281"),
    (wrong_programs, r"0\.5 \* gradient", "0.0 * gradient"),
    (wrong_programs, "loss 0.510 after", "loss 0.510 then"),
    (wrong_numbers, r"\[\d\.\d+\]\[closed-1-score\]", "[7.77][closed-1-score]"),
    (wrong_numbers, r'"held_out:DPO 1:score"', '"held_out:DPO 1:scores"'),
    (wrong_numbers, r"\[closed-1-score\]: .*\n", ""),
    (wrong_numbers, r"\[53%\]\[spoken-1\]", "[54%][spoken-1]"),
    (wrong_numbers, r"\[\d\.\d+\]\[vote-bound\]", "0.861"),
    (wrong_tables, r"\| DPO \| \+2\.32", "| DPO | +2.42"),
    (wrong_tables, "rows table:base | table:SFT", "rows table:SFT | table:base"),
    (wrong_tables, "90% to 98%", "90% to 97%"),
    (wrong_tables, "`▁compass`", "`▁fork`"),
    (wrong_json, '"qid": ', '"qid": 1'),
    (wrong_json, "tokens:prompt:ids -->", "tokens:chosen:ids -->"),
    (wrong_answers, r"\*\*1\.1\*\* The factors", "**1.9** The factors"),
    (wrong_answers, "= 0.072, 0.268", "= 0.268, 0.072"),
    (wrong_answers, r"\*\*8\.1\*\* 6,738,415,616", "**8.1** 6,738,415,617"),
    (wrong_by_hand, r"\| 0\.379 \|", "| 0.397 |"),
    (wrong_by_hand, "= 0.5981", "= 0.5891"),
    (wrong_problems, r"\*\(P11\)\*", "*(P15)*"),
    (wrong_figures, r"!\[([^\]]*)\]\(figures/\w+", r"![\1](figures/nothing"),
    (missing_names, "`tests/test_loss", "`tests/test_lose"),
    (missing_names, "`test_the_gradient", "`test_no_gradient"),
    (missing_names, r"\]\(figures/seeds\.svg\)", "](figures/seed.svg)"),
    (wrong_commands, "bash\npython train.py --model", "bash\npython train.py --modle"),
    (wrong_commands, "pytest tests/test_bugs.py", "pytest tests/bugs_test.py"),
    (wide_lines, "\n\nIn brackets: make", f"\n\n{'wide ' * 21}"),
]


@pytest.mark.parametrize("check, old, new", CHANGES)
def test_a_change_is_noticed(check, old, new):
    changed = re.sub(old, new, TEXT, count=1)
    assert changed != TEXT
    assert set(check(changed)) - set(check(TEXT))


def test_a_wrong_number_in_the_readme_is_noticed():
    text = (ROOT / "README.md").read_text("utf-8")
    assert "[1.74][trl-4]" in text
    assert len(wrong_numbers(text.replace("[1.74][trl-4]", "[1.75][trl-4]"))) == 1


def test_the_tutorial_is_under_14_000_words():
    # Without code, marks of where numbers are from, the bars and the numbers of tables.
    text = re.sub(r"^```.*?^```|<!--.*?-->|^\[[\w-]+\]: .*?$", "", TEXT, flags=re.M | re.S)
    assert len(re.findall(r"\S*[A-Za-z]\S*", text)) < 14_000
