"""How the time and the memory of a DPO step grow with the length, the batch and the model.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --axes length --lengths 512 1024 2048 --model random:llama-2-7b

One of them grows at a time, the others stay as the flags say. Each point is measured by
benchmarks/step.py in a process of its own, so that its peak memory is its own.
"""

from models import model_folder
from record import save
from step import read_arguments, run_alone, step_flags, step_parser

AXES = ("length", "pairs", "model")
COLUMNS = ("seconds", "ratio", "tokens/s", "loaded GB", "peak GB", "step adds GB", "ratio")


def points_of(axis: str, args) -> list:
    """The values of one axis."""
    return {"length": args.lengths, "pairs": args.batches, "model": args.models}[axis]


def measure(axis: str, value, args) -> dict:
    """One point: what step.py measured there."""
    changes = {axis: value} | ({"prompt": None} if axis == "length" else {})
    settings = vars(args) | changes
    model_folder(settings["model"], args.scratch)  # made here: the child process only reads it
    result = run_alone("step.py", step_flags(args, **changes))
    result["step_adds_bytes"] = result["step_peak_bytes"] - result["loaded_bytes"]
    return {axis: value} | result


def row(axis: str, point: dict, first: dict) -> str:
    """One line of the table: a point, and its ratios to the first point."""
    cells = [
        f"{point['step_seconds']:.3f}",
        f"{point['step_seconds'] / first['step_seconds']:.2f}",
        f"{point['tokens_per_second']:,.0f}",
        *(f"{point[name] / 1e9:.2f}" for name in ("loaded_bytes", "step_peak_bytes")),
        f"{point['step_adds_bytes'] / 1e9:.2f}",
        f"{point['step_adds_bytes'] / first['step_adds_bytes']:.2f}",
    ]
    return f"{str(point[axis]):22}" + "".join(f"{cell:>14}" for cell in cells)


def main():
    """The command line: print a table per axis, and write the figures if --json is given."""
    parser = step_parser(__doc__, pairs=2, length=256, steps=3)
    add = parser.add_argument
    add("--axes", nargs="+", choices=AXES, default=AXES)
    add("--lengths", nargs="+", type=int, default=[128, 256, 512, 1024])
    add("--batches", nargs="+", type=int, default=[1, 2, 4, 8], help="pairs per step")
    models = ["random:tiny", "random:smollm2-135m", "random:tinyllama-1.1b"]
    add("--models", nargs="+", default=models)
    args = read_arguments(parser)
    result = {}
    for axis in args.axes:
        print(f"\n{axis:22}" + "".join(f"{name:>14}" for name in COLUMNS), flush=True)
        points = result[axis] = []
        for value in points_of(axis, args):
            points.append(measure(axis, value, args))
            print(row(axis, points[-1], points[0]), flush=True)
        save(args, result)  # after each axis, in case a later one fails


if __name__ == "__main__":
    main()
