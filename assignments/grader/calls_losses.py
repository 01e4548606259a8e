"""The calls of the losses, and of the student's NumPy file."""

import importlib
import sys
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from grader.calls_tools import gradients, module, parameter, tensor


class StandInModel(nn.Module):
    """A language model whose state at t is the sum of the embeddings up to t."""

    def __init__(self, E, W, dtype):
        super().__init__()
        self.embedding = parameter(E, dtype)
        self.lm_head = nn.Linear(*W.shape[::-1], bias=False)
        self.lm_head.weight = parameter(W, dtype)

    def hidden(self, tokens, positions=None, mask=None, cache=None):
        return self.embedding[tokens].cumsum(dim=1)


def logps(tokens, loss_mask, E, W, dtype="float32", chunk=1024, sources=None, g=None):
    loss = module("loss")
    loss.CHUNK = chunk
    model = StandInModel(E, W, dtype)
    rows = torch.tensor(tokens), torch.tensor(loss_mask)
    if sources is not None:
        y = loss.token_logps(model, *rows, sources=torch.tensor(sources))
        return {"token logps": y}
    y = loss.sequence_logps(model, *rows)
    out = {"logps": y, "dtype": y.dtype}
    leaves = {"E": model.embedding, "W": model.lm_head.weight}
    return out if g is None else out | gradients(y, g, **leaves)


def dpo(pc, pr, rc, rr, beta, dtype="float32", g=None, **options):
    pc, pr = tensor(pc, dtype, grad=True), tensor(pr, dtype, grad=True)
    rc, rr = tensor(rc, dtype), tensor(rr, dtype)
    losses, chosen, rejected = module("loss").dpo_loss(pc, pr, rc, rr, beta, **options)
    out = {"losses": losses, "chosen": chosen, "rejected": rejected}
    out["rewards carry gradients"] = chosen.requires_grad or rejected.requires_grad
    return out if g is None else out | gradients(losses, g, pc=pc, pr=pr)


def dpo_refuses(kinds, smoothings):
    """What it raises for options that make no sense."""
    raised = []
    for kind, smoothing in zip(kinds, smoothings, strict=True):
        try:
            module("loss").dpo_loss(*torch.zeros(4, 1), 0.1, smoothing, kind)
            raised.append("nothing")
        except NotImplementedError:
            raise
        except Exception as error:
            raised.append(type(error).__name__)
    return {"raised": raised}


@contextmanager
def by_hand():
    """Import the student's NumPy file while torch cannot be imported."""
    hidden = {name: sys.modules[name] for name in sys.modules if name.split(".")[0] == "torch"}
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield importlib.import_module("by_hand")
    finally:
        sys.modules.update(hidden)


def dpo_gradient(pc, pr, rc, rr, beta, label_smoothing=0.0):
    with by_hand() as file:
        chosen, rejected = file.dpo_gradient(pc, pr, rc, rr, beta, label_smoothing)
    return {"d pc": np.asarray(chosen), "d pr": np.asarray(rejected)}


def logps_gradient(logits, targets):
    with by_hand() as file:
        return {"d logits": np.asarray(file.logps_gradient(logits, targets))}
