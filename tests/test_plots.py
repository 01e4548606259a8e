"""Pictures of runs: what is drawn is what metrics.jsonl says; bad folders are one line."""

import json
import sys

import pytest

from dpo_minimal import InputError
from dpo_minimal.extras import plots

STEPS = [
    {"stage": "sft", "step": 0, "loss": 5.0},
    {"stage": "sft", "step": 1, "loss": 1.0},
    {"stage": "dpo", "step": 0, "eval_rewards/margins": -1.0, "eval_loss": 0.7},
    *({"stage": "dpo", "step": i, "loss": 9.0, "rewards/margins": float(i)} for i in range(4)),
    {"stage": "dpo", "step": 4, "eval_rewards/margins": 2.5},
]
MARGINS = ("dpo", ["rewards/margins"], "margins", "nats")


def make_run(folder, rows=STEPS, table=None):
    """A folder as a run leaves it."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if table:
        (folder / "eval.json").write_text(json.dumps({"table": table}))
    return folder


def drawn(*runs, panel=MARGINS, smooth=None):
    """(colour, x, y) of every line of a panel."""
    figures = pytest.importorskip("matplotlib.figure", reason="pip install matplotlib")
    axis = figures.Figure().subplots()
    plots.draw_panel(axis, panel, list(runs), smooth)
    assert axis.get_xlabel() == "step" and axis.get_ylabel() and axis.get_title()
    return [
        (line.get_color(), list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines
    ]


def test_a_panel_shows_the_steps_of_its_stage_and_held_out_values_as_points():
    colour = plots.COLOURS[0]
    line, points = drawn(STEPS)
    assert line == (colour, [0, 1, 2, 3], [0, 1, 2, 3])
    assert points == (colour, [0, 4], [-1, 2.5])


def test_a_smoothed_line_is_a_mean_of_neighbours_beside_the_steps_themselves():
    faint, line, _ = drawn(STEPS, smooth=3)
    assert faint[2] == [0, 1, 2, 3] and line[2] == [0.5, 1, 2, 2.5]


def test_several_runs_have_colours_of_their_own_and_a_run_without_a_stage_is_left_out():
    lines = drawn(STEPS, STEPS, panel=("dpo", ["loss"], "loss", "per pair"))
    assert [colour for colour, _, _ in lines if len(_) > 1] == plots.COLOURS[:2]
    bare = [row for row in STEPS if row["stage"] == "dpo"]
    assert [colour for colour, *_ in drawn(bare, STEPS, panel=("sft", ["loss"], "l", "n"))] == [
        plots.COLOURS[1]
    ]


def test_the_bars_are_the_kl_to_whatever_the_reference_is():
    table = {"base": {"kl_to_sft": 3.0}, "SFT": {"kl_to_sft": 0.0}, "DPO": {"kl_to_sft": 0.5}}
    assert plots.kl_bars({"table": table}) == {"base to SFT": 3.0, "DPO to SFT": 0.5}
    table = {"base": {"kl_to_base": 0.0}, "DPO": {"kl_to_base": 2.0}}
    assert plots.kl_bars({"table": table}) == {"DPO to base": 2.0}
    assert plots.kl_bars({}) == {}


def test_a_picture_is_opaque_and_white_at_its_edge_in_a_light_and_a_dark_page(tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="pip install matplotlib")
    one = make_run(tmp_path / "one", table={"DPO": {"kl_to_sft": 1.0}})
    two = make_run(tmp_path / "two", STEPS[2:])
    plots.draw_runs([one, two], tmp_path / "both.png")
    pixels = image.imread(tmp_path / "both.png")  # float32 [H, W, RGBA], 1 is white
    assert (pixels[..., 3] == 1).all() and (pixels[0] == 1).all() and (pixels[:, -1] == 1).all()
    assert pixels[..., :3].min() < 0.5
    assert not list(tmp_path.glob(".*"))  # nothing half-written


def test_a_last_line_that_is_still_being_written_is_no_damage(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "dpo", "st')
    assert plots.read_rows(run) == STEPS


@pytest.mark.parametrize(
    "damage",
    ["{", "7", '{"stage": "dpo", "loss": 1}', '{"stage": "dpo", "step": 1, "loss": "low"}'],
)
def test_a_damaged_row_is_refused_by_its_number(tmp_path, damage):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    run = make_run(tmp_path / "run")
    rows = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(f"{rows}{damage}\n{rows}")
    with pytest.raises(InputError, match=f"metrics.jsonl, line {len(STEPS) + 1}: not a row"):
        plots.draw_runs([run], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_what_cannot_be_drawn_is_one_line(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    run, empty = make_run(tmp_path / "run"), make_run(tmp_path / "empty", [])
    for folders, picture, message in (
        ([tmp_path / "no"], "a.png", "no: no metrics.jsonl: give the folder of a run"),
        ([empty], "a.png", "its metrics.jsonl has no steps yet"),
        ([run], "a.bmp", "ends in .png, .svg or .pdf"),
        ([run] * 8, "a.png", "8 runs: a picture has colours for 7 at most"),
        ([run], "no/a.png", "cannot be written"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            plots.draw_runs(folders, tmp_path / picture)
        assert "\n" not in str(caught.value)


def test_without_matplotlib_the_command_names_it_and_a_run_goes_on(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["plot", str(run)])
    with pytest.raises(InputError, match="plot.png needs matplotlib: pip install matplotlib"):
        plots.main()
    said = []
    plots.draw_curves(run, said.append)
    assert said == ["curves    not drawn: curves.png needs matplotlib: pip install matplotlib"]


def test_the_command_draws_one_run_into_its_folder_and_several_here(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plots, "draw_runs", lambda *what: drawn.append([*map(str, what[1:])]))
    for words, picture in ((["r"], "r/plot.png"), (["r", "s"], "plot.png")):
        monkeypatch.setattr(sys, "argv", ["plot", *words])
        plots.main()
        assert drawn.pop() == [picture, "None"] and capsys.readouterr().out == f"drew {picture}\n"
    monkeypatch.setattr(sys, "argv", ["plot", "r", "--out", "x.svg", "--smooth", "5"])
    plots.main()
    assert drawn == [["x.svg", "5"]]
