"""Direct Preference Optimization from scratch: Llama, NF4, LoRA, the DPO loss, one plain loop."""

__version__ = "0.2.0"


class InputError(ValueError):
    """What the user gave is wrong. The message is one line: what was found, where, what to do."""

    def __init__(self, message):
        words = " ".join(str(message).split())  # a file's name or another package may bring more
        text = "".join(letter if letter.isprintable() else "?" for letter in words[:2000])
        super().__init__(text)
