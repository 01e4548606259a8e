"""notebooks/one_pair.ipynb is executed, cell by cell, and its outputs compared; no Jupyter needed.

Words must be the same; numbers with a decimal point may differ in the fourth digit, because
machines do.
"""

import contextlib
import copy
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "one_pair.ipynb"
AGAIN = "run: jupyter nbconvert --execute --inplace notebooks/one_pair.ipynb"


def code_cells(notebook: dict) -> list[dict]:
    """The cells that are executed."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def committed(cell: dict) -> str:
    """A cell's text output as it is in the file."""
    return "".join("".join(output.get("text", [])) for output in cell["outputs"])


def same(found: str, expected: str) -> bool:
    """Whether two outputs agree; see the top of this file. Spaces count as one."""
    number = r"-?\d+\.\d+"
    words = [re.sub(number, "#", text).split() for text in (found, expected)]
    if words[0] != words[1]:
        return False
    pairs = zip(re.findall(number, found), re.findall(number, expected), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=5e-4, abs_tol=2.5e-4) for a, b in pairs)


def different(notebook: dict, outputs: list[str]) -> list[int]:
    """The numbers of the code cells whose committed output is not what executing them gave."""
    pairs = zip(code_cells(notebook), outputs, strict=True)
    return [n for n, (cell, found) in enumerate(pairs, start=1) if not same(found, committed(cell))]


@pytest.fixture(scope="module")
def notebook() -> dict:
    """The notebook of the tree."""
    return json.loads(NOTEBOOK.read_text("utf-8"))


@pytest.fixture(scope="module")
def outputs(notebook) -> list[str]:
    """What its code cells print, executed in order in one namespace, in the notebook's folder."""
    namespace, printed = {}, []
    random_state = torch.get_rng_state()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(NOTEBOOK.parent)
            for n, cell in enumerate(code_cells(notebook), start=1):
                with contextlib.redirect_stdout(io.StringIO()) as told:
                    exec(compile("".join(cell["source"]), f"cell {n}", "exec"), namespace)
                printed.append(told.getvalue())
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_rng_state(random_state)
    return printed


def test_each_cell_prints_what_the_notebook_shows(notebook, outputs):
    assert different(notebook, outputs) == [], AGAIN


def test_every_code_cell_was_executed_in_order_and_shows_its_output(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), AGAIN
    assert all(committed(cell) for cell in cells)
    assert 15 <= len(notebook["cells"]) <= 32


def test_a_changed_or_missing_output_is_noticed(notebook):
    outputs = [committed(cell) for cell in code_cells(notebook)]
    assert different(notebook, outputs) == []
    for n, cell in enumerate(code_cells(notebook), start=1):
        for text in (committed(cell) + "5", ""):
            changed = copy.deepcopy(notebook)
            code_cells(changed)[n - 1]["outputs"] = [{"text": [text]}]
            assert different(changed, outputs) == [n]


def test_a_digit_that_a_reader_sees_matters_and_the_last_one_does_not():
    assert same("loss 0.6931\nsum  -2.3642", "loss 0.6932\nsum -2.3641")
    assert not same("loss 0.6931", "loss 0.6951")
    assert not same("16 of 16", "15 of 16")
    assert not same("loss 0.6931", "loss -0.6931")
    assert not same("0.5 and 0.5", "0.5")
