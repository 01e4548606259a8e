"""The command line of demo.py: a page where a run's base, SFT and DPO answer side by side.

python -m dpo_minimal.demo RUN                  on http://127.0.0.1:7860
python -m dpo_minimal.demo RUN --space DIR      the same as a folder for a Hugging Face Space
"""

import argparse

from dpo_minimal.extras import answers, page, space
from dpo_minimal.extras.command_line import refuse, whole
from dpo_minimal.extras.flags import check_device
from dpo_minimal.extras.machine import device_and_dtype


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    lines_kept = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lines_kept)
    parser.error = refuse
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/forum")
    parser.add_argument("--model", help="the base model's folder, if it was moved since the run")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: let other machines in")
    parser.add_argument("--port", type=whole(1, 2**16 - 1), default=7860)
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    types = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=types, help="bfloat16 on a GPU, else float32")
    parser.add_argument("--space", metavar="DIR", help="write a Space's folder, and stop")
    return parser


def main():
    """The command line."""
    args = make_parser().parse_args()
    if args.space:
        print(space.write_space(answers.find_run(args.run, args.model), args.space))
        return
    place = {"host": args.host, "port": args.port}
    serve(args.run, args.model, device=args.device, dtype=args.dtype, **place)


def serve(folder, model=None, *, host: str, port: int, device=None, dtype=None):
    """Open a run and show its page until Ctrl-C.

    InputError if gradio is missing or something is wrong with the run.
    """
    gradio = page.import_gradio()
    run = answers.find_run(folder, model)
    check_device(device)
    trio = answers.open_run(run, *device_and_dtype(device, dtype))
    blocks = page.build(gradio, trio)
    page.launch(gradio, blocks, host, port)
    print(f"The page is at {blocks.local_url} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()
