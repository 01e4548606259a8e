"""The README's example as a library is run as it stands, with three steps for a hundred."""

from pathlib import Path

from test_train import preference_rows, write_rows

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


def test_the_library_example_runs_and_learns(tmp_path, monkeypatch, capsys, model_folder):
    code = README.split("```python\n")[1].split("```")[0]
    assert "range(100)" in code and code.count("path/to/model") == 2
    code = code.replace("range(100)", "range(12)").replace("path/to/model", str(model_folder))
    code = code.replace("max_new_tokens=64", "max_new_tokens=4").replace("1024", "96")
    write_rows(tmp_path / "pairs.jsonl", preference_rows())
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = [float(words[1]) for words in lines if words and words[0].isdecimal()]
    assert len(losses) == 12
    assert abs(losses[0] - 0.6931471805599453) <= 2**-24  # ln 2, the mean of four float32
    assert losses[-1] < losses[0]
    names = {path.name for path in (tmp_path / "my-adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
