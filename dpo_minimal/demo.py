"""A page in the browser: a question, and the answers of a run's base, SFT and DPO side by side.

python -m dpo_minimal.demo RUN

`extras/demo.py` is its command line.
"""

if __name__ == "__main__":
    import dpo_minimal.extras.quiet  # noqa: F401, I001 (first: Ctrl-C while the rest loads)
    from dpo_minimal.extras.command_line import run_command
    from dpo_minimal.extras.demo import main

    run_command(main)
