"""Answers that the taught code does not have: what it leaves to torch, and the NumPy file.

A function's decorator says which function it replaces. The rest of the reference solution is the
taught code itself.
"""

import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from dpo_minimal.llama import at_least_float32, rotate
from dpo_minimal.log import Log
from dpo_minimal.loop import count_steps, learning_rate, save_state, start, steps_per_epoch
from dpo_minimal.nf4 import NF4_CODE, dequantize_absmax

ANSWERS = []  # (variant's choice or None, file, qualified name, function)


def answers(file: str, name: str, choice: str | None = None):
    """Enter a function as the answer for a hole, for all variants or for those of one choice."""

    def enter(function):
        ANSWERS.append((choice, file, name, function))
        return function

    return enter


@answers("dpo_minimal/llama.py", "Attention.forward")
def attention(self, x, cos, sin, mask=None, cache=None):
    B, T, _ = x.shape
    q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H, T, K]
    k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, G, T, K]
    v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if cache is not None:
        k, v = cache.extend(k, v)
    k = k.repeat_interleave(self.group_size, dim=1)  # [B, H, T, K]
    v = v.repeat_interleave(self.group_size, dim=1)
    scores = q @ k.transpose(2, 3) / self.head_dim**0.5  # [B, H, T, all]
    if mask is None:  # the new tokens are the last ones
        mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T)
    y = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
    return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


@answers("by_hand.py", "logps_gradient")
def logps_gradient(logits, targets):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    gradient = -p
    gradient[np.arange(len(targets)), targets] += 1
    return gradient


@answers("by_hand.py", "dpo_gradient")
def dpo_gradient(pc, pr, rc, rr, beta, label_smoothing=0.0):
    h = beta * ((pc - rc) - (pr - rr))
    weight = 1 / (1 + np.exp(np.minimum(h, 700)))  # sigmoid(-h)
    slope = -beta * (weight - label_smoothing) / len(h)
    return slope, -slope


@answers("dpo_minimal/loss.py", "chunk_logps")
def chunk_logps(hidden, head, targets):
    logits = head(hidden)
    logits = logits.to(at_least_float32(logits))  # [N, V]
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)


@answers("dpo_minimal/nf4.py", "dequantize_nf4")
def dequantize_nf4(quantized):
    absmax = dequantize_absmax(quantized)  # [blocks]
    nibbles = torch.stack((quantized.packed >> 4, quantized.packed & 15), dim=1).flatten()
    n = math.prod(quantized.shape)
    values = NF4_CODE.to(nibbles.device)[nibbles[:n].int()]
    absmax = absmax.repeat_interleave(quantized.block_size)[:n]
    values = values * absmax
    return values.to(quantized.dtype).view(quantized.shape)


@answers("dpo_minimal/loop.py", "train")
def train(model, stage, settings, folder, resume=False, asked=()):
    folder, num_batches = Path(folder), stage.order.num_batches(settings.batch_size)
    steps = count_steps(settings, num_batches)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay, fused=True)
    state_path, log_path = folder / "state" / f"{stage.name}.pt", folder / "metrics.jsonl"
    first_step, num_tokens, place = start(state_path, model, optimizer, stage.tables, resume)
    log = Log(log_path, stage.name, first_step, steps, steps_per_epoch(settings, num_batches))
    draw = stage.order.batches(settings.batch_size, place)
    model.train()
    for step in range(first_step, steps):
        due = settings.eval_every and step % settings.eval_every == 0
        if stage.evaluate and due and (step or settings.eval_at_start):
            log.write(step, prefix="eval_", **stage.evaluate(model))
        started, rate = time.perf_counter(), learning_rate(step, steps, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = []
        for _ in range(settings.grad_accum):
            rows, place = next(draw)
            batches.append(stage.collate(rows))
        count = sum(batch.count for batch in batches)
        sums = Counter()
        for batch in batches:
            losses, metrics = stage.objective(model, batch)
            (losses.sum() / count).backward()
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] += float(values.detach().sum())
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(batch.num_tokens for batch in batches)
        num_tokens += tokens
        means = {name: value / count for name, value in sums.items()}
        means |= {"grad_norm": float(norm), "learning_rate": rate, "num_tokens": num_tokens}
        speed = tokens / (time.perf_counter() - started)
        log.write(step, tokens_per_second=speed, **means)
        if asked or settings.save_every and (step + 1) % settings.save_every == 0:
            progress = step + 1, num_tokens, place
            save_state(state_path, model, optimizer, stage.tables, progress)
        if asked:
            raise KeyboardInterrupt(f"stopped at step {step + 1}")
    if stage.evaluate:
        log.write(steps, prefix="eval_", **stage.evaluate(model))
