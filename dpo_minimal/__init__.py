"""Direct Preference Optimization from scratch: Llama, NF4, LoRA, the DPO loss, one plain loop."""

import sys


class InputError(ValueError):
    """What the user gave is wrong. The message is one line: what was found, where, what to do."""


def run_command(main):
    """Run a command line: an InputError is one line and exit status 2, without a traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
