"""A Llama without numbers, for names and shapes: faster than one on the meta device alone.

There torch would import its compiler, because it initializes a meta tensor by a decomposition.
"""

import torch
from torch.overrides import TorchFunctionMode

from dpo_minimal.llama import Llama, LlamaConfig


class NoInitialization(TorchFunctionMode):
    """Within the context, the functions of torch.nn.init leave their tensor as it is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def skeleton(config: LlamaConfig) -> Llama:
    """A Llama on the meta device."""
    with torch.device("meta"), NoInitialization():
        return Llama(config)
