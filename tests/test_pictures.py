"""The explaining pictures of figures/: made again the same, well-formed, right in their numbers.

The numbers that they show are worked out here by hand or by other formulas.
"""

import hashlib
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

# At the end, so that figures/bugs.py does not take the place of tests/bugs.py.
sys.path.append(str(Path(__file__).parents[1] / "figures"))

import pictures
import svg

FIGURES = Path(__file__).parents[1] / "figures"
NAMES = [make.__name__ for make in pictures.PICTURES]


def picture(name: str) -> str:
    """The committed picture."""
    return (FIGURES / f"{name}.svg").read_text("utf-8")


def texts(name: str) -> list[str]:
    """All texts of a committed picture, in order."""
    root = ElementTree.fromstring(picture(name))
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("make", pictures.PICTURES, ids=lambda make: make.__name__)
def test_a_picture_made_again_is_the_same_file(make):
    assert make() == picture(make.__name__), "run: python figures/pictures.py"


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_says_how_it_was_made_and_stays_within_its_white_page(name):
    root = ElementTree.fromstring(picture(name))
    space = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{space}desc").text.startswith(pictures.ABOUT)
    width, height = float(root.get("width")), float(root.get("height"))
    page, *others = root.iter(f"{space}rect")
    assert page.attrib == {"x": "0", "y": "0", "width": root.get("width"),
                           "height": root.get("height"), "fill": "white"}  # fmt: skip
    for part in others:
        x, y, w, h = (float(part.get(key)) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width and 0 <= y <= y + h <= height
    for part in root.iter(f"{space}text"):
        # 0.6 of the size per letter is more than DejaVu Sans takes on average.
        length = 0.6 * float(part.get("font-size")) * len(part.text)
        start = {"start": 0, "middle": length / 2, "end": length}[part.get("text-anchor")]
        turned = "transform" in part.attrib
        assert turned or float(part.get("x")) - start >= -8
        assert turned or float(part.get("x")) - start + length <= width + 8, part.text


def test_the_shared_prompt_is_drawn_from_the_pair():
    digest = hashlib.sha256((FIGURES / "results" / "one_pair.json").read_bytes()).hexdigest()
    assert f"drawn from one_pair.json, sha256 {digest}" in picture("shared_prompt")


def test_the_tilt_has_the_numbers_worked_by_hand():
    # Z = 0.6 + 0.3 e + 0.1 e^2 = 0.6 + 0.8155 + 0.7389 = 2.1544; 0.6 / Z = 0.2785 and so on.
    numbers = [words for words in texts("tilt") if re.fullmatch(r"\d\.\d{3}", words)]
    assert numbers == ["0.600", "0.300", "0.100", "1.000", "2.718", "7.389",
                       "0.600", "0.815", "0.739", "0.279", "0.379", "0.343"]  # fmt: skip
    assert "sum Z = 2.154" in texts("tilt")


def test_the_values_of_nf4_are_the_published_ones():
    published = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0,
                 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568,
                 1]  # fmt: skip
    numbers = [words for words in texts("nf4") if re.fullmatch(r"-?\d\.\d{3}", words)]
    assert numbers == [f"{value:.3f}" for value in published]
    # (0.9677 - 0.5) / 7 and / 8
    assert any("6.7%" in words for words in texts("nf4"))
    assert any("5.8%" in words for words in texts("nf4"))


def test_lengths_are_short_and_zero_has_no_sign():
    assert [svg.number(x) for x in (1, 0.1, -0.04, -2.96, 1 / 3)] == ["1", "0.1", "0", "-3", "0.3"]
