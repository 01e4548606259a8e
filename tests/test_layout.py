"""Folders as data sets have them: what is trained on is never evaluated on, and the reverse."""

import json

import pytest

from dpo_minimal import InputError
from dpo_minimal.data import load_splits
from dpo_minimal.extras.digest import of_files


def write(path, name, n=20):
    """A file of n pairs whose questions begin with its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{name} {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def first_words(pairs):
    """The files that pairs are from."""
    return {pair.prompt.split()[0] for pair in pairs}


LAYOUTS = {  # folder: {file: its use}
    "files": {"train.jsonl": "train", "test.jsonl": "evaluation", "notes.txt": None},
    "parts": {
        "data/train-00000-of-00002.jsonl": "train",
        "data/train-00001-of-00002.jsonl": "train",
        "data/validation-00000-of-00001.jsonl": "evaluation",
    },
    "ultrafeedback": {
        "data/train_prefs-00000.jsonl": "train",
        "data/train_sft-00000.jsonl": "sft",
        "data/train_gen-00000.jsonl": None,
        "data/test_prefs-00000.jsonl": "evaluation",
        "data/test_sft-00000.jsonl": None,
    },
    "blog": {
        "data/rl/a.jsonl": "train",
        "data/rl/b.jsonl": "train",
        "data/finetune/a.jsonl": "sft",
        "data/evaluation/a.jsonl": "evaluation",
        "data/reward/a.jsonl": None,
    },
    "beside": {"pairs.jsonl": "train", "evaluation/a.jsonl": "evaluation"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_file_is_read_for_its_own_use(tmp_path, layout):
    for file in LAYOUTS[layout]:
        write(tmp_path / file, file)
    splits = load_splits(tmp_path, log=str)
    uses = {use: {f for f, of in LAYOUTS[layout].items() if of == use} for use in ("train", "sft")}
    held_out = {file for file, use in LAYOUTS[layout].items() if use == "evaluation"}
    assert first_words(splits.train) == uses["train"]
    assert first_words(splits.sft) == (uses["sft"] or uses["train"])
    assert first_words(splits.evaluation) == held_out


def test_a_folder_without_such_names_is_all_for_training_and_some_is_held_out(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, name)
    splits = load_splits(tmp_path, log=str)
    assert first_words(splits.train) == {"a.jsonl", "b.jsonl"}
    assert len(splits.train) + len(splits.evaluation) == 40


def test_a_test_file_beside_one_that_does_not_say_what_it_is_is_refused(tmp_path):
    for name in ("pairs.jsonl", "test.jsonl"):
        write(tmp_path / name, name)
    with pytest.raises(InputError, match=r"has test\*, but no train\*: name files by --data"):
        load_splits(tmp_path)
    eval_data = tmp_path / "test.jsonl"
    splits = load_splits(tmp_path / "pairs.jsonl", eval_data, log=str)
    assert first_words(splits.evaluation) == {"test.jsonl"}


def test_a_pattern_names_files_and_their_digest(tmp_path):
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl"):
        write(tmp_path / name, name)
    splits = load_splits(tmp_path / "a*", log=str)
    assert first_words(splits.train) == {"a1.jsonl", "a2.jsonl"}
    before = of_files(tmp_path / "a*")
    write(tmp_path / "b.jsonl", "c")
    assert of_files(tmp_path / "a*") == before
    write(tmp_path / "a2.jsonl", "c")
    assert of_files(tmp_path / "a*") != before


def test_a_file_with_brackets_in_its_name_has_a_digest(tmp_path):
    path = tmp_path / "pairs[v2].jsonl"
    write(path, "q")
    before = of_files(path)
    write(path, "c")
    assert of_files(path) != before


def test_the_line_ends_of_windows_do_no_harm(tmp_path):
    write(tmp_path / "unix.jsonl", "q")
    text = (tmp_path / "unix.jsonl").read_bytes()
    (tmp_path / "windows.jsonl").write_bytes(text.replace(b"\n", b"\r\n"))
    unix, windows = (load_splits(tmp_path / f"{n}.jsonl", log=str) for n in ("unix", "windows"))
    assert list(unix.train) == list(windows.train)
