"""A digest of data files: a resumed run must go on with the data that it began with."""

import hashlib
from pathlib import Path


def of_files(*places) -> str:
    """A hash of the names and contents of files, or of all files below folders; "" for None."""
    digest = hashlib.sha256()
    for place in places:
        files = []
        if place is not None:
            path = Path(place)
            found = path.rglob("*") if path.is_dir() else path.parent.glob(path.name)
            files = sorted(file for file in found if file.is_file())
        for file in files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    return digest.hexdigest()
