"""How a submission's functions are called: arrays in, arrays out. Nothing here knows an answer.

Every `call` that a check names is in CALLS. What a problem uses but does not ask for is replaced by
a plain stand-in, so that a mistake in one problem costs nothing in another.
"""

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from grader import calls_layers, calls_losses, calls_text


class Refuse(TorchFunctionMode):
    """Refuses torch's ready-made version of what a problem asks for."""

    def __init__(self, banned):
        super().__init__()
        self.banned = set(banned)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "").split(".")[0]  # "rms_norm.default" of torch.ops
        if name in self.banned:
            raise RuntimeError(f"{name} is not allowed here: write it yourself")
        return function(*args, **(kwargs or {}))


def run(call: str, inputs: dict, banned: list[str]) -> dict:
    """Call by name; what comes back is arrays and plain values."""
    with Refuse(banned):
        result = CALLS[call](**inputs)
    return {name: plain(value) for name, value in result.items()}


def plain(value):
    """A tensor as an array (16-bit ones widened), anything else as it is if JSON can hold it."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
        return value.cpu().numpy()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (np.ndarray, str, int, float, bool, type(None), list, tuple)):
        return value
    return f"a {type(value).__name__}"


def warm_up():
    """Use what torch imports only at first use, so that no child has to wait for it."""
    torch.set_num_threads(1)
    x = torch.ones(2, requires_grad=True)
    checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
    torch.optim.AdamW([x], fused=True).step()
    nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 1, 2, 2))


LAYERS = (
    "rmsnorm",
    "rotary",
    "attention",
    "nf4_code",
    "nf4_outline",
    "quantize",
    "dequantize",
    "nf4_matmul",
)
ADAPTERS = ("lora", "new_adapter", "merge")
LOSSES = ("logps", "dpo", "dpo_refuses", "dpo_gradient", "logps_gradient")
TEXTS = ("encode", "encode_pair", "answer_rows", "training")
CALLS = {name: getattr(calls_layers, name) for name in LAYERS + ADAPTERS}
CALLS |= {name: getattr(calls_losses, name) for name in LOSSES}
CALLS |= {name: getattr(calls_text, name) for name in TEXTS}
