"""Curves of one run, or of several in one picture. `extras/plots.py` is its command line:

python -m dpo_minimal.plot RUN [RUN ...] [--out FILE]
"""

if __name__ == "__main__":
    from dpo_minimal.extras.command_line import run_command
    from dpo_minimal.extras.plots import main

    run_command(main)
