"""The assignments: the reference gets all points, an empty handout none, wrong ones lose theirs.

One grader is used for everything here. `python assignments/self_check.py` has the rest: more
seeds, every variant, the hostile submissions, the visible tests of a handout.
"""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "assignments"))

pytest.importorskip("resource")  # the grader runs where processes have limits, not on Windows

import grade  # noqa: E402
import make_gradescope  # noqa: E402
import make_handout  # noqa: E402
from grader import source  # noqa: E402
from grader.agree import agree  # noqa: E402
from grader.arrays import pack, unpack  # noqa: E402
from problems import ladder  # noqa: E402
from problems.all_problems import PROBLEMS, chosen, text_of  # noqa: E402
from problems.variants import AXES, COUNT, Variant, number_of, variant  # noqa: E402
from solutions import solved  # noqa: E402
from solutions.hostile import HOSTILE, hostile_files, touched  # noqa: E402
from solutions.wrong import WRONG, check_wrong  # noqa: E402

EVERYTHING = bool(os.environ.get("ASSIGNMENTS_EVERYTHING"))
SAMPLE = [next(w for w in WRONG if w.problem == problem.name) for problem in PROBLEMS]


@pytest.fixture(scope="module")
def grader():
    """A grader for all tests of this file: one import of torch. Give it back as it was."""
    with grade.Grader(Variant(), seed=7) as grader:
        yield grader


@contextmanager
def asking(grader, v, problems):
    """The grader with another variant and fewer problems."""
    before = grader.v, grader.problems
    grader.v, grader.problems = v, problems
    try:
        yield grader
    finally:
        grader.v, grader.problems = before


def submission(tmp_path, v=Variant()):  # noqa: B008
    return solved.write(tmp_path / "submission", solved.solution(v))


def lost(rows):
    return {row["problem"] for row in rows if row["score"] < row["max"]}


# --- the reference, nothing, and wrong solutions ----------------------------------------------


def test_the_reference_gets_all_points_and_results_json_has_gradescopes_fields(grader, tmp_path):
    rows = grader.grade(submission(tmp_path))
    assert not lost(rows), grade.report(rows)
    results = json.loads(json.dumps(grade.results_of(rows, ("gradient",), 12.34)))
    assert results["score"] == sum(problem.points for problem in PROBLEMS)
    assert results["stdout_visibility"] == "hidden" and results["execution_time"] == 12.3
    assert results["visibility"] == "visible" and isinstance(results["output"], str)
    assert set(results) <= {
        *("score", "execution_time", "output", "visibility", "stdout_visibility", "tests"),
        *("extra_data", "leaderboard", "output_format", "test_output_format"),
    }
    for test in results["tests"]:
        assert set(test) == {"name", "score", "max_score", "status", "output", "visibility"}
        assert isinstance(test["name"], str) and isinstance(test["output"], str)
        assert 0 <= test["score"] <= test["max_score"]
        assert test["status"] in ("passed", "failed")
        held_back = test["name"].endswith(": gradient")
        assert test["visibility"] == ("after_published" if held_back else "visible")
    assert len({test["name"] for test in results["tests"]}) == len(results["tests"])


def test_the_taught_code_passes_where_it_calls_nothing_that_is_refused(grader, tmp_path):
    paths = {path for problem in PROBLEMS for path in problem.files if not problem.template}
    files = {path: (ROOT / path).read_text("utf-8") for path in paths}
    own = {name for _, _, name, _ in solved.ANSWERS}
    overridden = [p for p in PROBLEMS if own & set(p.holes) and not p.banned and not p.template]
    with asking(grader, Variant(), overridden):
        rows = grader.grade(solved.write(tmp_path, files))
    assert len(overridden) > 2 and not lost(rows), grade.report(rows)


def test_an_empty_handout_scores_nothing_and_shows_no_answer(grader, tmp_path):
    out = tmp_path / "handout"
    make_handout.make(out, list(PROBLEMS), Variant())
    answers = make_handout.removed(list(PROBLEMS)).keys() | solved.own_statements(PROBLEMS)
    assert len(answers) > 100 and not make_handout.survivors(out, answers)
    package = [p for p in (ROOT / "dpo_minimal").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert all((out / path.relative_to(ROOT)).exists() for path in package), "not the whole package"
    rows = grader.grade(out)
    assert sum(row["score"] for row in rows) == 0
    assert {row["output"] for row in rows} == {"Not written yet."}


def test_what_is_cut_as_optional_need_not_be_written(grader, tmp_path):
    files = solved.solution(Variant())
    stub = "raise NotImplementedError()"
    helpers = {"dpo_minimal/loss.py": ("sigmoid_loss", "ipo_loss", "hinge_loss")}
    for problem in PROBLEMS:
        helpers |= {path: names for path, names in problem.helpers.items() if path in files}
    for path, names in helpers.items():
        files[path] = source.replace_bodies(files[path], dict.fromkeys(names, stub))
    whole = """
delta = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
if kind not in LOSSES or (label_smoothing and kind != "sigmoid"):
    raise ValueError(kind)
losses = -F.logsigmoid(beta * delta) * (1 - label_smoothing)
losses = losses - F.logsigmoid(-beta * delta) * label_smoothing
if kind == "ipo":
    losses = (delta - 1 / (2 * beta)) ** 2
if kind == "hinge":
    losses = torch.relu(1 - beta * delta)
chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps).detach()
return losses, chosen_rewards, beta * (policy_rejected_logps - ref_rejected_logps).detach()
"""
    loss = "dpo_minimal/loss.py"
    files[loss] = source.replace_bodies(files[loss], {"dpo_loss": whole.strip()})
    with asking(grader, Variant(), chosen(["dpo_loss", "dequantize", "training"])):
        rows = grader.grade(solved.write(tmp_path, files))
    assert len(helpers) == 3 and not lost(rows), grade.report(rows)


@pytest.mark.parametrize("wrong", WRONG if EVERYTHING else SAMPLE, ids=lambda w: w.problem)
def test_a_wrong_solution_loses_its_rungs_and_is_told_why(grader, wrong):
    assert check_wrong(grader, wrong) is None


def test_every_problem_has_at_least_five_wrong_solutions():
    for problem in PROBLEMS:
        own = [wrong for wrong in WRONG if wrong.problem == problem.name]
        assert len(own) >= 5
        assert {wrong.bug for wrong in own} - {"-"} <= set(problem.bugs)
        for wrong in own:  # what it replaces is there
            solved.spoiled(Variant(), problem.name, wrong.changes)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_zeros_and_the_answer_to_another_draw_reach_no_rung(problem):
    inputs, others = (ladder.draw(problem, Variant(), seed) for seed in (3, 4))
    for check in problem.checks:
        with np.errstate(all="ignore"):
            expected = check.expect(inputs[check.rung], Variant())
            other = check.expect(others[check.rung], Variant())
        arrays = {n: np.zeros_like(e) for n, e in expected.items() if isinstance(e, np.ndarray)}
        assert not arrays or agree(expected | arrays, expected, check.tolerance)
        seeded = check.rung not in ("options", "evaluation", "step 0", "one row")
        if seeded and inputs[check.rung] and "prompt" not in expected:
            fits = agree(other, expected, check.tolerance)
            assert (
                fits or expected.get("encoded", 0) is None or expected == {"raised": "InputError"}
            )


def test_a_draw_is_passed_over_where_a_mistake_does_no_harm_or_rounding_decides():
    def expect(inputs, v, bug=""):
        return {"y": inputs["x"] - (0 if bug else inputs["w"])}

    drawn = {
        "harmless": {"x": np.array([3.0]), "w": np.array([0.0])},
        "shaky": {"x": np.float32([1]), "w": np.float32([1.000001])},
        "good": {"x": np.array([3.0]), "w": np.array([2.0])},
    }
    for order in (("harmless", "shaky", "good"), ("shaky", "good", "harmless")):
        draws = iter([drawn[name] for name in order] * ladder.DRAWS)
        check = ladder.Check("value", 1, "f", lambda rng, v, draws=draws: next(draws), expect, "")
        problem = ladder.Problem(
            "p", "P", "f", ("f",), "", (check,), {"w left out": "w is left out."}
        )
        assert ladder.draw(problem, Variant(), 0)["value"] is drawn["good"]


def test_log_probabilities_to_be_graded_are_not_lost_in_rounding():
    (problem,) = chosen(["response_logps"])
    checks = {check.rung: check for check in problem.checks}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        inputs = checks["hand value"].inputs(rng, Variant())
        assert np.abs(checks["hand value"].expect(inputs, Variant())["logps"]).max() >= 0.5
        inputs = checks["16 bits"].inputs(rng, Variant())
        logits = np.cumsum(inputs["E"][inputs["tokens"]], axis=1) @ inputs["W"].T
        assert np.array_equal(logits.astype(np.float16), logits)


# --- variants ---------------------------------------------------------------------------------


def test_variants_are_numbered_without_gaps_and_zero_is_the_taught_code():
    assert variant(0) == Variant() and not variant(0).changes
    assert len({variant(number) for number in range(COUNT)}) == COUNT
    for axis, choices in AXES.items():
        for choice in choices:
            assert getattr(variant(number_of(**{axis: choice})), axis) == choice
    with pytest.raises(ValueError):
        variant(COUNT)


@pytest.mark.parametrize("axis", AXES)
def test_a_variant_asks_for_something_else_and_its_reference_gives_it(grader, axis, tmp_path):
    choices = AXES[axis][1:]
    for choice in choices if EVERYTHING else choices[-1:]:
        v = variant(number_of(**{axis: choice}))
        changed = [p for p in PROBLEMS if text_of(p, v) != text_of(p, Variant())]
        assert changed
        with asking(grader, v, changed):
            assert not lost(grader.grade(submission(tmp_path / choice.replace("/", " "), v)))
            taught = lost(grader.grade(submission(tmp_path / "taught", Variant())))
        # The taught code has these two already: the variants only ask for them.
        right = {"ipo": {"dpo_loss"}, "cdpo": {"dpo_loss", "dpo_gradient"}}.get(v.loss, set())
        assert taught == {p.name for p in changed} - right


# --- what a submission may not do -------------------------------------------------------------


def test_a_hostile_submission_loses_its_points_only(grader, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    names = ("forks without end", "reads the grader's files", "writes everywhere", "leaves at once")
    for hostile in (h for h in HOSTILE if EVERYTHING or h.name in names):
        place = solved.write(tmp_path / hostile.name, hostile_files(hostile, canary))
        with asking(grader, Variant(), touched(hostile)):
            rows = grader.grade(place)
        if not {"files", "calls"} <= grader.layers:
            pytest.skip("this system confines nothing")
        assert lost(rows) == set(hostile.loses), hostile.name
        assert not any("I CAN READ" in row["output"] for row in rows)
    assert canary.read_text() == "untouched"


def test_messages_come_back_whole_and_damaged_ones_are_refused():
    values = {"a": np.arange(6.0).reshape(2, 3), "b": np.array(True), "n": None, "l": [1, "x"]}
    message = pack(values)
    back = unpack(message)
    assert np.array_equal(back["a"], values["a"]) and back["b"] and back["l"] == [1, "x"]
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(message)
        for _ in range(rng.randrange(1, 5)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            unpack(bytes(damaged[: rng.randrange(len(damaged) + 1)]))
        except ValueError:
            continue
    for header in (
        b"[]",
        b'{"plain": 1, "arrays": []}',
        b'{"plain": {}, "arrays": [[1, "O", []]]}',
    ):
        with pytest.raises(ValueError):
            unpack(header + b"\n")


def test_links_and_other_odd_files_are_not_read(tmp_path):
    (tmp_path / "secret").write_text("x")
    os.symlink(tmp_path / "secret", tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    assert grade.read_result(tmp_path / "link") is None
    assert grade.read_result(tmp_path / "pipe") is None
    folder = tmp_path / "submitted"
    (folder / "dpo_minimal").mkdir(parents=True)
    os.symlink(tmp_path / "secret", folder / "dpo_minimal" / "llama.py")
    assert grade.submitted(folder, "dpo_minimal/llama.py") is None
    os.symlink("loss.py", folder / "dpo_minimal" / "loss.py")
    assert grade.submitted(folder, "dpo_minimal/loss.py") is None
    (folder / "llama.py").write_text("here")
    assert grade.submitted(folder, "dpo_minimal/llama.py") == "here"


@pytest.mark.parametrize("place", ["dpo_minimal", "", "work", "work/dpo_minimal"])
def test_a_file_is_found_as_students_hand_it_in(tmp_path, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / "__MACOSX" / "dpo_minimal").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "dpo_minimal" / "._loss.py").write_text("not it")
    (tmp_path / place / "loss.py").write_text("here")
    assert grade.submitted(tmp_path, "dpo_minimal/loss.py") == "here"
    assert grade.submitted(tmp_path, "dpo_minimal/lora.py") is None


def test_whatever_a_child_writes_gets_feedback_that_can_be_printed():
    problem = PROBLEMS[0]
    inputs = ladder.draw(problem, Variant(), 0)
    strange = ("\ud800", "\n", np.zeros(2), [[[]]], {"a": None}, float("nan"), True)
    for check in problem.checks:
        for name in ("empty", "error", "place", *check.expect(inputs[check.rung], Variant())):
            for value in strange:
                for got in ({name: value}, {"error": "x", name: value}):
                    said = grade.judge(problem, check, inputs[check.rung], got, got, Variant())
                    assert said and said.isprintable()


# --- the handout's text, the autograder's zip -------------------------------------------------


def test_a_tutorial_loses_the_blocks_that_show_an_answer():
    shown = "    absmax = blocks.abs().amax(dim=1)"
    text = f"Before.\n\n```python\n{shown}\n```\n\nBetween.\n\n```\npython train.py\n```\n"
    answers = make_handout.removed(list(PROBLEMS))
    kept = make_handout.without_answers(text, answers)
    assert "amax" not in kept and "problem 5" in kept
    assert "Between." in kept and "python train.py" in kept


def test_a_hole_keeps_signature_and_docstring():
    text = 'def f(x):\n    """Doc."""\n    # a hint\n    y = x + 1\n    return y\n\n\nZ = f(1)\n'
    cut = source.replace_bodies(text, {"f": "raise NotImplementedError()"})
    cut = source.guard_imports(cut, {"f": "0"})
    place = {}
    exec(cut, place)  # noqa: S102
    assert place["Z"] == 0 and place["f"].__doc__ == "Doc." and "hint" not in cut


def test_the_autograder_runs_from_its_zip_and_holds_no_answer(tmp_path):
    chosen = PROBLEMS[:1]
    options = ["--problems", chosen[0].name, "--seed", "1"]
    data = make_gradescope.make_zip(make_gradescope.files_of(chosen, options, None))
    place = tmp_path / "autograder"
    for name in ("source", "results"):
        (place / name).mkdir(parents=True)
    with zipfile.ZipFile(BytesIO(data)) as archive:
        archive.extractall(place / "source")
        names = archive.namelist()
        assert not any("solutions" in name for name in names)
        assert {"dpo_minimal/forum.json", "dpo_minimal/formats/peft.py"} <= set(names)
    submission(place)
    script = shutil.which("bash"), place / "source" / "run_autograder"
    environment = os.environ | {"AUTOGRADER": str(place), "PYTHON": sys.executable}
    subprocess.run(script, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=120)
    results = json.loads((place / "results" / "results.json").read_text())
    assert results["score"] == chosen[0].points
    environment["PYTHON"] = "false"  # whatever goes wrong, there is a result that says so
    subprocess.run(script, env=environment, check=True, timeout=120)
    results = json.loads((place / "results" / "results.json").read_text())
    assert results["score"] == 0 and "tell the staff" in results["output"]


def test_the_autograder_installs_the_releases_that_the_repository_asks_for():
    lines = (ROOT / "requirements.txt").read_text("utf-8").split()
    wanted = {line for line in lines if not line.startswith("pytest")}
    installed = shlex.split(make_gradescope.setup().replace("\\\n", " "))
    assert len(wanted) >= 3 and wanted <= set(installed)
    assert not {"torch", "numpy"} & set(installed), "without a release"
    assert subprocess.run(["bash", "-n"], input=make_gradescope.setup(), text=True).returncode == 0


def test_the_readme_counts_what_there_is():
    text = " ".join((ROOT / "assignments" / "README.md").read_text("utf-8").split())
    mistakes = sum(len(problem.bugs) for problem in PROBLEMS)
    for said in (
        f"which of {mistakes} usual mistakes",
        f"(0 to {COUNT - 1})",
        f"{len(WRONG)} plausible wrong solutions",
        f"{len(HOSTILE)} hostile submissions",
    ):
        assert said in text, said
