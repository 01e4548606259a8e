"""Which files of a data folder are for what: the layouts that data sets have on the hub."""

from pathlib import Path

from dpo_minimal import InputError
from dpo_minimal.formats.rows import SUFFIXES

# For each use the names that folders and files have, the first that is there is taken. The blog's
# stack-exchange-paired has folders, ultrafeedback_binarized files, and most others train and test.
NAMES = {
    "train": ("rl", "train_prefs*", "train*"),
    "evaluation": ("evaluation", "test_prefs*", "test*", "validation*", "valid*", "eval*", "dev*"),
    "sft": ("finetune", "train_sft*"),
}


def data_parts(path: Path) -> dict[str, Path]:
    """{use: a file, a folder, or a folder and a pattern}; only "train" is always there.

    InputError for a folder with files for evaluation and others that do not say what they are.
    """
    if not path.is_dir():
        return {"train": path}
    if (path / "data").is_dir():
        path = path / "data"  # where the hub's data sets keep their parts
    parts = {}
    for use, names in NAMES.items():
        found = [path / name for name in names if is_there(path, name)]
        if found:
            parts[use] = found[0]
    unnamed = parts.get("evaluation", path).name
    if "train" not in parts and "*" in unnamed:
        raise InputError(f"{path}: has {unnamed}, but no train*: name files by --data, --eval-data")
    return {"train": path} | parts


def is_there(folder: Path, name: str) -> bool:
    """Whether a folder has a part of this name: a folder, or for a pattern a data file."""
    if "*" not in name:
        return (folder / name).is_dir()
    return any(file.name.endswith(SUFFIXES) for file in folder.glob(name) if file.is_file())
