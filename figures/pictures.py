"""The pictures that explain: five SVG files from strings, no matplotlib, no training.

    python figures/pictures.py

pipeline, two_models, tilt and nf4 come from this file alone, and shared_prompt from
figures/results/one_pair.json. Made again they are the same to the byte, which a test checks.
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from statistics import NormalDist

sys.path.insert(0, str(Path(__file__).parents[1]))  # the root, for the import of dpo_minimal

import svg
from drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, RESULTS

from dpo_minimal.nf4 import NF4_CODE

HERE = Path(__file__).parent
ABOUT = "made by figures/pictures.py"
# What is in each box, and the file that makes it, or its colour and the step before it.
STATIONS = [
    (["a row of a file", "question, response_j,", "response_k"], "formats/rows.py"),
    (["a pair of texts", "prompt, chosen,", "rejected"], "data.py"),
    (["token ids", "one row: prompt +", "chosen + rejected"], "batches.py"),
    (["log-probabilities", "per token, summed", "per answer: log π(y|x)"], "loss.py"),
    (["δ and the loss", "−log σ(βδ), from", "four sums"], "loss.py"),
]
STAGES = [
    (["base", "reads text;", "stored in 4 bits"], GREY, ""),
    (["+ adapter sft", "learns to answer", "as the data do"], GREEN, "SFT"),
    (["+ adapter dpo", "learns what", "people prefer"], BLUE, "DPO"),
    (["merged", "one plain model,", "for other programs"], svg.INK, "export"),
]


def pipeline() -> str:
    """What a pair becomes on its way to the adapter, and what the model becomes stage by stage."""
    parts = [svg.text(16, 58, "What a pair becomes", 12, GREY)]
    for i, (lines, file) in enumerate(STATIONS):
        x = 16 + 176 * i
        parts.append(svg.box(x, 70, 150, 66, lines, size=11))
        parts.append(svg.text(x + 75, 152, file, 10.5, GREY, "middle"))
        if i:
            parts.append(svg.arrow(x - 26, 103, x - 2, 103))
    parts.append(svg.text(16, 318, "What the model becomes", 12, GREY))
    for i, (lines, colour, step) in enumerate(STAGES):
        x = 16 + 226 * i
        parts.append(svg.box(x, 330, 150, 66, lines, colour, size=11))
        if i:
            parts.append(svg.arrow(x - 76, 363, x - 2, 363))
            parts.append(svg.text(x - 39, 355, step, 11, GREY, "middle"))
    parts += [
        svg.box(430, 208, 122, 40, ["reference π_ref", "sft on, dpo off"], GREEN, size=11),
        svg.box(566, 208, 122, 40, ["policy π", "sft on, dpo on"], BLUE, size=11),
        svg.arrow(491, 207, 588, 158, GREEN),
        svg.arrow(627, 207, 622, 158, BLUE),
        svg.path([(317, 329), (317, 300), (491, 300), (491, 256)], **thin(GREEN)),
        svg.arrow(491, 262, 491, 250, GREEN),
        svg.path([(543, 329), (543, 300), (627, 300), (627, 256)], **thin(BLUE)),
        svg.arrow(627, 262, 627, 250, BLUE),
        svg.path([(795, 158), (795, 316), (600, 316), (600, 322)], **thin(RED, "5 3")),
        svg.arrow(600, 316, 600, 328, RED),
        *(
            svg.text(803, 226 + 16 * i, words, 11, RED)
            for i, words in enumerate(("the gradient", "moves the", "adapter dpo", "alone"))
        ),
    ]
    title = "From a file of preferences to an adapter"
    return svg.document(898, 410, ABOUT, title, parts)


def thin(colour: str, dashes: str = "none") -> dict[str, str | float]:
    """Attributes of a bent line."""
    return dict(fill="none", stroke=colour, stroke_width=1.5, stroke_dasharray=dashes)


def two_models() -> str:
    """One linear layer with two adapters, and the two models that a switch makes of it."""
    parts = []
    for x, name, colour, on in ((16, "reference", GREEN, False), (440, "policy", BLUE, True)):
        symbol = "π" if on else "π_ref"
        parts += [
            svg.text(x, 60, f"The {name}, {symbol}: {'with' if on else 'without'} dpo", 12, colour),
            *layer(x, on),
        ]
    parts += [
        svg.text(16, 356, "grey: frozen", 11.5, GREY),
        svg.text(110, 356, "red: trained by DPO, in float32", 11.5, RED),
        svg.text(16, 376, "All of it is in memory once: the models differ by a switch.", 11.5),
    ]
    title = "One model in memory is two: each linear layer, y = Wx + sft(x) + dpo(x)"
    return svg.document(852, 392, ABOUT, title, parts)


def layer(x: float, on: bool) -> list[str]:
    """A linear layer, its input at the left: W and both adapters between x and y."""
    rows = [
        (108, ["W", "4 bits"], GREY),
        (196, ["adapter sft", "B · A, rank 8"], GREY),
        (284, ["adapter dpo", "B · A, rank 8"], RED),
    ]
    parts = [
        svg.text(x + 4, 200, "x", 15, font_style="italic"),
        svg.line(x + 18, 196, x + 54, 196),
        svg.line(x + 54, 108, x + 54, 284),
        svg.element("circle", cx=x + 318, cy=196.0, r=13.0, fill="white", stroke=svg.INK),
        svg.text(x + 318, 201, "+", 16, anchor="middle"),
        svg.arrow(x + 331, 196, x + 366, 196),
        svg.text(x + 372, 200, "y", 15, font_style="italic"),
    ]
    for y, lines, colour in rows:
        faded = {} if on or colour == GREY else {"stroke_dasharray": "5 4"}
        parts.append(svg.arrow(x + 54, y, x + 84, y))
        parts.append(svg.box(x + 86, y - 24, 124, 48, lines, colour, **faded))
        if colour == RED and not on:
            parts += [
                svg.line(x + 210, y, x + 246, y, RED),
                svg.line(x + 246, y, x + 270, y - 18, RED, 2.0),  # the open switch
                svg.line(x + 276, y, x + 318, y, RED),
                svg.text(x + 222, y + 20, "switched off", 11, RED),
            ]
        else:
            parts.append(svg.line(x + 210, y, x + (304 if y == 196 else 318), y, colour))
    return [
        *parts,
        svg.arrow(x + 318, 108, x + 318, 182, GREY),
        svg.arrow(x + 318, 284, x + 318, 210, RED if on else svg.FAINT),
    ]


def shared_prompt() -> str:
    """The real row of figures/one_pair.py: who sees whom, positions, and what is scored."""
    path = RESULTS / "one_pair.json"
    data = json.loads(path.read_text("utf-8"))
    row, size, left, top = data["shared_row"], 13, 100, 132
    colours = {"prompt": GREY, "chosen": BLUE, "rejected": RED}
    pieces = [piece for part in data["tokens"].values() for piece in part["pieces"]]
    parts = [svg.text(left - 8, top - 10, "sees  →", 11, GREY, "end")]
    for i, (piece, segment) in enumerate(zip(pieces, row["segments"], strict=True)):
        colour, shown = colours[segment], piece.replace("▁", "␣")
        x, y = left + size * i, top + size * i
        parts += [
            svg.text(left - 8, y + 10.5, shown, 10.5, colour, "end"),
            svg.turned(x + 10, top - 20, shown, 90, 10.5, colour),
            svg.text(x + 6.5, top - 6, str(row["positions"][i]), 8, colour, "middle"),
        ]
        parts += seen_cells(row, i, colours, (left, y, size))
        scored = left + size * len(pieces) + 8
        if row["loss_mask"][i]:
            parts.append(svg.rectangle(scored, y, size - 1, size - 1, GREEN))
    first, second = (row["segments"].index(part) for part in ("chosen", "rejected"))
    x, y = left + size * (first + second) / 2, top + size * (second + 6)
    notes = [
        (8, colours["prompt"], ["prompt: computed", "once, not scored"]),
        (first + 2, colours["chosen"], ["chosen and its end:", "scored"]),
        (second + 2, colours["rejected"], ["rejected and its end:", "scored"]),
    ]
    parts += [
        svg.lines_of_text(x, y, ["rejected", "does not see", "chosen"], 11.5, anchor="middle"),
        svg.turned(scored + 10, top - 20, "scored", 90, 10.5, GREEN),
        svg.text(scored + 20, top - 6, "← position after the prompt", 10.5, GREY),
        *(
            svg.lines_of_text(scored + 24, top + size * at, lines, 11, colour=colour)
            for at, colour, lines in notes
        ),
    ]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    about = f"{ABOUT}, drawn from {path.name}, sha256 {digest}"
    title = f"One row for a pair: {len(pieces)} tokens, and which of them each one sees"
    return svg.document(scored + 190, top + size * len(pieces) + 16, about, title, parts)


def seen_cells(row: dict, i: int, colours: dict[str, str], place) -> list[str]:
    """A bar per part of the row that token i sees. place: x of the row, y of the line, size."""
    (left, y, size), parts = place, []
    for name, colour in colours.items():
        seen = [k for k in range(i + 1) if row["mask"][i][k] == "1"]
        seen = [k for k in seen if row["segments"][k] == name]
        if seen:  # always without a gap
            area = size * len(seen) - 1, size - 1
            parts.append(svg.rectangle(left + size * seen[0], y, *area, colour))
    return parts


def tilt() -> str:
    """The reference, the factors e^(r/beta), their products and the optimum, of three answers."""
    answers, ref, rewards, beta = "ABC", (0.6, 0.3, 0.1), (0, 1, 2), 1.0
    factors = [math.exp(r / beta) for r in rewards]
    products = [p * f for p, f in zip(ref, factors, strict=True)]
    z = sum(products)
    panels = [
        ("the reference π_ref", ref, "sum 1", 1.0, GREY, ""),
        ("the tilt e^(r/β)", factors, "r = 0, 1, 2; β = 1", 8.0, PURPLE, "×"),
        ("their product", products, f"sum Z = {z:.3f}", 1.0, ORANGE, "="),
        ("the optimum π*", [p / z for p in products], "sum 1", 1.0, BLUE, "÷ Z ="),
    ]
    parts, bottom, height = [], 232, 140
    for i, (title, values, note, full, colour, before) in enumerate(panels):
        x = 16 + 200 * i
        parts += [
            svg.text(x, 60, title, 12.5, colour, font_weight="bold"),
            svg.line(x, bottom, x + 144, bottom, GREY),
            svg.text(x + 72, bottom + 38, note, 11, GREY, "middle"),
        ]
        if before:
            parts.append(svg.text(x - 28, bottom - 60, before, 17, anchor="middle"))
        for k, value in enumerate(values):
            tall, at = height * value / full, x + 8 + 46 * k
            parts += [
                svg.rectangle(at, bottom - tall, 36, tall, colour),
                svg.text(at + 18, bottom - tall - 5, f"{value:.3f}", 11, anchor="middle"),
                svg.text(at + 18, bottom + 17, answers[k], 12, anchor="middle"),
            ]
    title = "Three answers: the optimum is the reference, tilted by the reward"
    return svg.document(776, 286, ABOUT, title, parts)


def nf4() -> str:
    """The 16 values of NF4 under the normal density, and the equal masses between them."""
    code = NF4_CODE.tolist()
    normal = NormalDist()
    outermost = normal.inv_cdf(0.9677083)  # what the code was divided by
    left, bottom, wide, high = 40, 232, 700, 380

    def place(value, density=0.0):
        return left + wide * (value + 1.25) / 2.5, bottom - high * density

    def curve(start, end, pieces=12):
        grid = [start + (end - start) * k / pieces for k in range(pieces + 1)]
        return [place(v, normal.pdf(v * outermost)) for v in grid]

    parts = []
    for i, (start, end) in enumerate(zip(code, code[1:], strict=False)):
        area = [place(start), *curve(start, end), place(end)]
        fill = ("#cfe3f1", "#e8f1f8") if start < 0 else ("#fbe3b4", "#fdf2da")
        parts.append(svg.path(area, closed=True, fill=fill[i % 2]))
    parts.append(
        svg.path(curve(-1.25, 1.25, pieces=120), fill="none", stroke=GREY, stroke_width=1.5)
    )
    parts.append(svg.line(left, bottom, left + wide, bottom, GREY))
    for i, value in enumerate(code):
        x, top = place(value, normal.pdf(value * outermost))
        parts += [
            svg.line(x, bottom, x, top, RED if value == 0 else BLUE, 1.5),
            svg.turned(x + 4, bottom + 8, f"{value:.3f}", 60, 10, anchor="end"),
            svg.text(x, bottom + 58, str(i), 9.5, GREY, "middle"),
        ]
    axis = "the value, as a share of its block's absmax; below it the 4-bit number"
    below, above = (0.5 - normal.cdf(-outermost)) / 7, (normal.cdf(outermost) - 0.5) / 8
    parts += [
        svg.text(16, 52, f"7 stripes below 0, each with {below:.1%} of the mass", 11.5, BLUE),
        svg.text(560, 52, f"8 above, each with {above:.1%}", 11.5, "#9a6700"),
        svg.text(left + wide / 2, bottom + 78, axis, 11, GREY, "middle"),
    ]
    title = "NF4's sixteen values: dense where weights are many, and 0 is one of them"
    return svg.document(780, 322, ABOUT, title, parts)


PICTURES = [pipeline, two_models, shared_prompt, tilt, nf4]


def main():
    """Write figures/NAME.svg for each picture."""
    for make in PICTURES:
        path = HERE / f"{make.__name__}.svg"
        path.write_text(make(), "utf-8")
        print(f"drew {path}")


if __name__ == "__main__":
    main()
