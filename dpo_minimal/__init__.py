"""Direct Preference Optimization from scratch: Llama, NF4, LoRA, the DPO loss, one plain loop."""

__version__ = "0.2.0"


class InputError(ValueError):
    """What the user gave is wrong. The message is one line: what was found, where, what to do."""
