"""`python -m dpo_minimal.train`: train.py from anywhere, once pip has installed the package."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).parent
    installed = here / "main" / "train.py"  # where pyproject.toml puts it
    path = installed if installed.exists() else here.parent / "train.py"
    runpy.run_path(str(path), run_name="__main__")
