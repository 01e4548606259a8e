"""Answers to what variants ask for where it is not what the taught code does."""

import math
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dpo_minimal.batches import pad
from dpo_minimal.nf4 import linspace32
from solutions.standard import answers


@answers("dpo_minimal/llama.py", "rotate", "interleaved")
def rotate_neighbours(x, cos, sin):
    first, second = x.to(cos.dtype)[..., 0::2], x.to(cos.dtype)[..., 1::2]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


@answers("dpo_minimal/nf4.py", "nf4_code", "NF3")
def nf3_code() -> torch.Tensor:
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in linspace32(0.9330357, 0.5, 5)[:-1].tolist()]
    below = [-quantile(p) for p in linspace32(0.9330357, 0.5, 4)[:-1].tolist()]
    code = torch.tensor(sorted([*above, 0.0, *below]))
    return code / code.abs().max()


@answers("dpo_minimal/nf4.py", "nf4_code", "mirrored")
def mirrored_code() -> torch.Tensor:
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in linspace32(0.9677083, 0.5, 8)[:-1].tolist()]
    below = [-quantile(p) for p in linspace32(0.9677083, 0.5, 9)[:-1].tolist()]
    code = torch.tensor(sorted([*above, 0.0, *below]))
    return code / code.abs().max()


@answers("dpo_minimal/lora.py", "Adapter.__init__", "alpha/sqrt(r)")
def rank_stabilized(self, in_features: int, out_features: int, r: int, alpha: float, dropout):
    nn.Module.__init__(self)
    bound = 1 / math.sqrt(in_features)
    self.lora_A = nn.Parameter(torch.empty(r, in_features).uniform_(-bound, bound))
    self.lora_B = nn.Parameter(torch.zeros(out_features, r))
    self.scale, self.dropout = alpha / math.sqrt(r), dropout


@answers("dpo_minimal/loss.py", "sigmoid_loss", "robust")
def robust_loss(delta, beta: float, label_smoothing: float):
    """DPO; with label smoothing, robust DPO."""  # `train.py --help` reads this line
    e = label_smoothing
    losses = -(1 - e) * F.logsigmoid(beta * delta) + e * F.logsigmoid(-beta * delta)
    return losses / (1 - 2 * e)


@answers("by_hand.py", "dpo_gradient", "ipo")
def ipo_gradient(pc, pr, rc, rr, beta, label_smoothing=0.0):
    delta = (pc - rc) - (pr - rr)
    slope = 2 * (delta - 1 / (2 * beta)) / len(delta)
    return slope, -slope


@answers("by_hand.py", "dpo_gradient", "robust")
def robust_gradient(pc, pr, rc, rr, beta, label_smoothing=0.0):
    h = beta * ((pc - rc) - (pr - rr))
    weight = 1 / (1 + np.exp(np.minimum(h, 700)))  # sigmoid(-h)
    slope = -beta * (weight + label_smoothing / (1 - 2 * label_smoothing)) / len(h)
    return slope, -slope


@answers("dpo_minimal/batches.py", "answer_rows", "skip first")
def rows_without_first(examples, device):
    tokens = [prompt + answer for prompt, answer in examples]
    masks = [[False] * (len(p) + 1) + [True] * (len(a) - 1) for p, a in examples]
    return pad(tokens, 0, torch.int64, device), pad(masks, False, torch.bool, device)


@answers("dpo_minimal/batches.py", "answer_rows", "no EOS")
def rows_without_eos(examples, device):
    tokens = [prompt + answer for prompt, answer in examples]
    masks = [[False] * len(p) + [True] * (len(a) - 1) + [False] for p, a in examples]
    return pad(tokens, 0, torch.int64, device), pad(masks, False, torch.bool, device)
