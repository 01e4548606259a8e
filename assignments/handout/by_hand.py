"""Gradients by hand, in NumPy alone: no torch, no autograd. Shapes: B pairs, N tokens, V words."""

import numpy as np  # noqa: F401


def dpo_gradient(pc, pr, rc, rr, beta: float, label_smoothing: float = 0.0):
    """(d L / d pc, d L / d pr), float64 [B] each, of the mean loss L of B pairs.

    pc, pr, rc, rr: log-probabilities of chosen and rejected answers under the policy (p) and the
    reference (r), float64 [B].
    """
    raise NotImplementedError("Problem 12: DPO's gradient by hand")


def logps_gradient(logits, targets):
    """d / d logits of the sum over n of log softmax(logits[n])[targets[n]], float64 [N, V].

    logits float64 [N, V]; targets int64 [N]. np.exp of a large number overflows.
    """
    raise NotImplementedError("Problem 12: DPO's gradient by hand")
