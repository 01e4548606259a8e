"""`python -m dpo_minimal.train`: train.py from anywhere, once pip has installed the package."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).parent
    places = (here / "main" / "train.py", here.parent / "train.py")  # pip's, or a checkout's
    runpy.run_path(str(next(filter(Path.exists, places))), run_name="__main__")
