"""Make the autograder zip of Gradescope (upload it under "Configure Autograder").

    python assignments/make_gradescope.py autograder.zip [--problems NAME ...] [--variant N]
        [--hold-back RUNG ...] [--open RUN]

Inside: setup.sh (runs once, when the image is built), run_autograder (runs for each submission),
the grader, and the package as students got it: no answer is in the zip.
"""

import argparse
import io
import shlex
import zipfile
from pathlib import Path

from grade import HERE, PACKAGE, cut
from problems.all_problems import chosen

GRADER = ("grade.py", "grader/*.py", "problems/*.py", "handout/by_hand.py")
# The image's Python may be old or have other packages, so the grader gets its own environment. It
# lies where every user may read it, so that submissions can run as the user nobody.
SETUP = """#!/usr/bin/env bash
set -euo pipefail
apt-get update
apt-get install -y --no-install-recommends python3 python3-venv
python3 -m venv /opt/grader
/opt/grader/bin/pip install --no-cache-dir {torch} \\
    --index-url https://download.pytorch.org/whl/cpu
/opt/grader/bin/pip install --no-cache-dir {others}
chmod -R a+rX /opt/grader
"""
RUN = """#!/usr/bin/env bash
# Standard output is hidden from students (results.json says so); only the grader writes results.
AUTOGRADER=${{AUTOGRADER:-/autograder}}
PYTHON=${{PYTHON:-/opt/grader/bin/python}}
chmod 700 "$AUTOGRADER/source" "$AUTOGRADER/results"
if ! "$PYTHON" "$AUTOGRADER/source/assignments/grade.py" "$AUTOGRADER/submission" \\
    --json "$AUTOGRADER/results/results.json" {options}; then
  echo '{{"score": 0, "output": "The autograder failed: please tell the staff."}}' \\
    > "$AUTOGRADER/results/results.json"
fi
"""


def setup() -> str:
    """setup.sh with the releases of requirements.txt; torch from the index without CUDA."""
    wanted = (PACKAGE / "requirements.txt").read_text("utf-8").split()
    torch = [shlex.quote(line) for line in wanted if line.startswith("torch")]
    others = [shlex.quote(line) for line in wanted if not line.startswith(("torch", "pytest"))]
    return SETUP.format(torch=" ".join(torch), others=" ".join(others))


def files_of(problems, options: list[str], run: Path | None) -> dict[str, bytes]:
    """The zip's members by name."""
    script = RUN.format(options=" ".join(map(shlex.quote, options)))
    members = {"setup.sh": setup().encode(), "run_autograder": script.encode()}
    for pattern in GRADER:
        for path in sorted(HERE.glob(pattern)):
            members[f"assignments/{path.relative_to(HERE)}"] = path.read_bytes()
    package = cut(PACKAGE, problems)
    if run is not None:  # the open problem runs the taught package over submitted weights
        members |= {f"taught/{p}": (PACKAGE / p).read_bytes() for p in package if p[:4] == "dpo_"}
        for path in sorted(p for part in ("base", "sft") for p in (run / part).rglob("*")):
            members[f"open/{path.relative_to(run)}"] = path.read_bytes()
    return members | {path: text.encode() for path, text in package.items()}


def make_zip(members: dict[str, bytes]) -> bytes:
    """The members as a zip; the scripts are executable."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            executable = name in ("setup.sh", "run_autograder")
            info.external_attr = (0o755 if executable else 0o644) << 16
            archive.writestr(info, data)
    return buffer.getvalue()


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zip", type=Path)
    parser.add_argument("--problems", nargs="+", help="names or numbers; all by default")
    parser.add_argument("--variant", type=int, default=0)
    parser.add_argument("--hold-back", nargs="+", default=[], help="rungs not shown to students")
    parser.add_argument("--open", type=Path, help="a run's folder (base/, sft/)")
    args = parser.parse_args()
    problems = chosen(args.problems)
    options = ["--variant", str(args.variant)]
    options += ["--problems", *(problem.name for problem in problems)]
    options += ["--hold-back", *args.hold_back] if args.hold_back else []
    options += ["--open", "/autograder/source/open"] if args.open else []
    args.zip.write_bytes(make_zip(files_of(problems, options, args.open)))
    print(f"{args.zip}: {args.zip.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
