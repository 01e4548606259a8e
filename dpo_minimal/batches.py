"""Token rows to batches: padding, pairs with their prompt computed once, packing, the order.

Two layouts of a pair give the same log-probabilities. The plain one, `answer_rows`, has a row for
each answer; training uses `pair_batch`, where chosen and rejected share a row and its prompt.
"""

import itertools
import random
from dataclasses import dataclass

import torch

from dpo_minimal.data import EncodedPair


@dataclass
class Batch:
    """Rows padded on the right: tokens int64 [B, T], loss_mask bool [B, T], True where scored.

    `count` is what the loss is averaged over: pairs (DPO) or scored tokens (SFT). `num_tokens` are
    those of the texts, without pads. Where a row holds several texts, `positions` int64 [B, T] and
    `mask` bool [B, 1, T, T] keep them apart. For pairs, `indices` says which ones they are,
    `rejected` bool [B, T] is True at the rejected answers, and `sources` int64 [B, T] gives the
    place whose state predicts each token.
    """

    tokens: torch.Tensor
    loss_mask: torch.Tensor
    count: int
    num_tokens: int
    positions: torch.Tensor
    mask: torch.Tensor
    indices: list[int] | None = None
    rejected: torch.Tensor | None = None
    sources: torch.Tensor | None = None


def pad(rows: list[list], fill, dtype, device) -> torch.Tensor:
    """Lists of unequal length as one [B, T] tensor, filled up on the right."""
    length = max(map(len, rows))
    padded = [row + [fill] * (length - len(row)) for row in rows]
    return torch.tensor(padded, dtype=dtype, device=device)


def answer_rows(examples, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, loss_mask), each [B, T], of (unscored ids, scored ids) pairs, one a row."""
    tokens = [prompt + answer for prompt, answer in examples]
    masks = [[False] * len(prompt) + [True] * len(answer) for prompt, answer in examples]
    # Any id will do for the pads: they are neither seen nor scored.
    return pad(tokens, 0, torch.int64, device), pad(masks, False, torch.bool, device)


def pair_batch(pairs: list[EncodedPair], indices: list[int], device) -> Batch:
    """The pairs at `indices`, one a row: prompt, chosen, rejected.

    The rejected answer's positions go on from the prompt, and it sees the prompt but not the chosen
    answer: each answer is computed as if it were alone, the prompt once for both.
    """
    tokens, scored, rejected, positions, sources, num_tokens = [], [], [], [], [], 0
    for prompt, chosen, rejected_answer in (pairs[i] for i in indices):
        P, C, R = len(prompt), len(chosen), len(rejected_answer)
        tokens.append(prompt + chosen + rejected_answer)
        scored.append([False] * P + [True] * (C + R))
        rejected.append([False] * (P + C) + [True] * R)
        positions.append([*range(P + C), *range(P, P + R)])
        # The state before it, but both answers' first tokens follow the prompt's last one.
        sources.append([*range(-1, P + C - 1), P - 1, *range(P + C, P + C + R - 1)])
        num_tokens += 2 * P + C + R
    rejected = pad(rejected, False, torch.bool, device)  # [B, T]
    chosen = pad(scored, False, torch.bool, device) & ~rejected
    apart = rejected[:, None, :, None] & chosen[:, None, None, :]  # [B, 1, T, T] query, key
    return Batch(
        tokens=pad(tokens, 0, torch.int64, device),
        loss_mask=chosen | rejected,
        count=len(indices),
        num_tokens=num_tokens,
        positions=pad(positions, 0, torch.int64, device),
        mask=torch.ones_like(apart).tril() & ~apart,
        indices=indices,
        rejected=rejected,
        sources=pad(sources, 0, torch.int64, device),
    )


def pair_lengths(pairs) -> list[int]:
    """Tokens of each pair's row, by which batches are formed."""
    return [len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs]


def pack(lengths: list[int], max_length: int) -> list[list[int]]:
    """Fill rows of max_length tokens with whole examples; returns the examples' numbers by row.

    Best fit: the longest examples first, each into the fullest row that still has room for it.
    """
    rows_by_room = [[] for _ in range(max_length + 1)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((r for r in range(lengths[i], max_length) if rows_by_room[r]), max_length)
        row = rows_by_room[room].pop() if room < max_length else []
        rows_by_room[room - lengths[i]].append(row + [i])
    return [row for rows in rows_by_room for row in rows]


def packed_batch(examples, rows: list[list[int]], device) -> Batch:
    """Packed rows as one batch. examples: (unscored ids, scored ids) each; rows: as from `pack`.

    Each example sees itself alone: `mask` is causal within it and its positions start at 0.
    """
    tokens, scored, positions, owners = [], [], [], []
    for row in rows:
        parts = [examples[i] for i in row]
        tokens.append([t for prompt, answer in parts for t in prompt + answer])
        scored.append([s for p, a in parts for s in [False] * len(p) + [True] * len(a)])
        positions.append([t for p, a in parts for t in range(len(p) + len(a))])
        owners.append([n for n, (p, a) in enumerate(parts) for _ in p + a])
    owner = pad(owners, -1, torch.int64, device)  # [B, T]
    same = owner[:, None, :, None] == owner[:, None, None, :]  # [B, 1, T, T]
    loss_mask = pad(scored, False, torch.bool, device)
    return Batch(
        tokens=pad(tokens, 0, torch.int64, device),
        loss_mask=loss_mask,
        count=sum(map(sum, scored)),
        num_tokens=sum(map(len, tokens)),
        positions=pad(positions, 0, torch.int64, device),
        mask=same.tril(),
    )


def batch_order(lengths: list[int], batch_size: int, seed: int):
    """Yield batches of indices for ever, epoch after epoch, each epoch in an order of its own.

    Within windows of 64 batches, indices are sorted by length, so that a batch needs little
    padding. The order depends on the seed alone: not on how often it is read, nor on torch's state.
    """
    for epoch in itertools.count():
        rng = random.Random(f"{seed}, epoch {epoch}")
        order = list(range(len(lengths)))
        rng.shuffle(order)
        window = 64 * batch_size
        windows = [order[i : i + window] for i in range(0, len(order), window)]
        order = [i for w in windows for i in sorted(w, key=lambda i: lengths[i])]
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(batches)
        yield from batches
