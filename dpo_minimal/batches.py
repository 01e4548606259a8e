"""Token ids to batches: padding, pairs with their prompt computed once, packing, the order.

Two layouts of a pair give the same log-probabilities. The plain one, `answer_rows`, has a row for
each answer; training uses `pair_batch`, where chosen and rejected share a row and its prompt.

Before a batch is made, a row is an index (of a pair) or a list of them (of texts packed together).
"""

import itertools
import math
import random
from array import array
from dataclasses import dataclass
from functools import partial

import torch

from dpo_minimal import InputError
from dpo_minimal.extras import ragged


@dataclass
class Batch:
    """Rows padded on the right: tokens int64 [B, T], loss_mask bool [B, T], True where scored.

    `count` is what the loss is averaged over: pairs (DPO) or scored tokens (SFT). `num_tokens`
    counts tokens without pads, and a pair's prompt twice. `mask` bool [B, 1, T, T] (on a GPU
    `Ragged`) separates the texts in a row; `positions` int64 [B, T] restart for each. For pairs,
    `indices` says which, `rejected` bool [B, T] is True at the rejected answers, and `sources`
    int64 [B, T] gives for each token the place in its row whose state predicts it.
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
    """(tokens, loss_mask), each [B, T], of (unscored ids, scored ids) examples, one per row."""
    tokens = [prompt + answer for prompt, answer in examples]
    masks = [[False] * len(prompt) + [True] * len(answer) for prompt, answer in examples]
    # Any id will do for the pads: they are neither seen nor scored.
    return pad(tokens, 0, torch.int64, device), pad(masks, False, torch.bool, device)


def pair_batch(pairs, indices: list[int], device) -> Batch:
    """The EncodedPairs at `indices`, one per row: prompt, chosen, rejected.

    The rejected answer's positions go on from the prompt, and it sees the prompt but not the chosen
    answer. So each answer is computed as if it were alone, and the prompt once for both. A row can
    be longer than max_length, which bounds the prompt with one answer.
    """
    tokens, scored, in_rejected, positions, sources, num_tokens = [], [], [], [], [], 0
    for prompt, chosen, rejected in (pairs[i] for i in indices):
        P, C, R = len(prompt), len(chosen), len(rejected)
        tokens.append(prompt + chosen + rejected)
        scored.append([False] * P + [True] * (C + R))
        in_rejected.append([False] * (P + C) + [True] * R)
        positions.append([*range(P + C), *range(P, P + R)])
        # The state before each token, but both answers' first tokens follow the prompt's last one.
        sources.append([*range(-1, P + C - 1), P - 1, *range(P + C, P + C + R - 1)])
        num_tokens += 2 * P + C + R
    is_scored = pad(scored, False, torch.bool, device)  # [B, T]
    is_rejected = pad(in_rejected, False, torch.bool, device)  # [B, T]
    is_chosen = is_scored & ~is_rejected
    apart = is_rejected[:, None, :, None] & is_chosen[:, None, None, :]  # [B, 1, T, T] query, key
    return Batch(
        tokens=pad(tokens, 0, torch.int64, device),
        loss_mask=is_scored,
        count=len(indices),
        num_tokens=num_tokens,
        positions=pad(positions, 0, torch.int64, device),
        mask=ragged.mask_for(torch.ones_like(apart).tril() & ~apart, positions, device),
        indices=indices,
        rejected=is_rejected,
        sources=pad(sources, 0, torch.int64, device),
    )


def packed_batch(examples, rows: list[list[int]], device) -> Batch:
    """Packed rows as one batch. examples: (unscored ids, scored ids); rows: their indices.

    Each example sees only itself: `mask` is causal within it, and its positions start at 0.
    """
    tokens, scored, positions, owners = [], [], [], []
    for row in rows:
        row_tokens, row_scored, row_positions, row_owners = [], [], [], []
        for owner, (prompt, answer) in enumerate(examples[i] for i in row):
            row_tokens += prompt + answer
            row_scored += [False] * len(prompt) + [True] * len(answer)
            row_positions += range(len(prompt + answer))
            row_owners += [owner] * len(prompt + answer)
        tokens.append(row_tokens)
        scored.append(row_scored)
        positions.append(row_positions)
        owners.append(row_owners)
    owner = pad(owners, -1, torch.int64, device)  # [B, T]
    same = owner[:, None, :, None] == owner[:, None, None, :]  # [B, 1, T, T]
    return Batch(
        tokens=pad(tokens, 0, torch.int64, device),
        loss_mask=pad(scored, False, torch.bool, device),
        count=sum(map(sum, scored)),
        num_tokens=sum(map(len, tokens)),
        positions=pad(positions, 0, torch.int64, device),
        mask=ragged.mask_for(same.tril(), positions, device),
    )


# --- the order --------------------------------------------------------------------------------


def pack(lengths: list[int], max_length: int) -> list[list[int]]:
    """Fill rows of max_length tokens with whole examples; returns the examples' indices per row.

    Best fit: the longest examples first, each into the fullest row that still has room for it.
    None of `lengths` may be above max_length.
    """
    rows_by_room = [[] for _ in range(max_length + 1)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((r for r in range(lengths[i], max_length) if rows_by_room[r]), max_length)
        row = rows_by_room[room].pop() if room < max_length else []
        rows_by_room[room - lengths[i]].append(row + [i])
    return [row for rows in rows_by_room for row in rows]


def packed_rows(examples, max_length: int, indices) -> list[list[int]]:
    """The examples at `indices` that fit, packed into rows of indices."""
    fitting = [i for i in indices if examples[i] is not None]
    lengths = [sum(map(len, examples[i])) for i in fitting]
    # `pack` leaves the rows sorted by how full they are. Sorting by the first text of each row, its
    # longest, brings back the random order of `indices`.
    return [[fitting[k] for k in row] for row in sorted(pack(lengths, max_length))]


def pair_rows(pairs, indices) -> list[int]:
    """The indices of pairs that fit, sorted by length, so that neighbours need little padding."""
    fitting = [i for i in indices if pairs[i] is not None]
    return sorted(fitting, key=lambda i: sum(map(len, pairs[i])))


def windows(n: int, size: int, seed: int):
    """Yield arrays of indices for ever: each epoch's shuffle of 0 ... n - 1, `size` at a time."""
    for epoch in itertools.count():
        order = array("q", range(n))
        random.Random(f"{seed}, epoch {epoch}").shuffle(order)
        yield from (order[at : at + size] for at in range(0, n, size))


class Order:
    """The order in which training sees n examples: each epoch sees each one once, in a new order.

    The shuffled indices of an epoch are cut into windows of `window`. form(indices) makes a
    window's rows: an index for each pair, or a list of indices for each packed row. Rows are cut
    into batches, and the batches are shuffled. So only one window must be tokenized at a time. The
    order depends on the seed alone, not on torch's random state.
    """

    def __init__(self, form, n: int, window: int, seed: int):
        self.form, self.n, self.window, self.seed = form, n, min(n, window), seed
        self.first_rows = len(form(next(windows(n, self.window, seed))))  # in the first window
        if not self.first_rows:
            raise InputError(f"all of {self.window} random examples are longer than --max-length")

    def num_rows(self) -> int:
        """Rows per epoch if all windows are like the first; exact if there is only one."""
        return math.ceil(self.first_rows * self.n / self.window)

    def num_batches(self, batch_size: int) -> int:
        """Batches per epoch, with the same assumption."""
        return math.ceil(math.ceil(self.first_rows / batch_size) * self.n / self.window)

    def batches(self, batch_size: int, place=(0, 0)):
        """Yield (rows of a batch, place) for ever; batches(batch_size, place) resumes after it.

        place: (windows done, batches done in the next window).
        """
        number, done = place
        for indices in itertools.islice(windows(self.n, self.window, self.seed), number, None):
            rows = self.form(indices)
            starts = list(range(0, len(rows), batch_size))
            random.Random(f"{self.seed}, window {number}").shuffle(starts)
            for at in starts[done:]:
                done += 1
                yield rows[at : at + batch_size], (number, done)
            number, done = number + 1, 0


def pair_order(pairs, batch_size: int, seed: int) -> Order:
    """Pairs in batches of similar lengths: sorted by length within windows of 64 batches."""
    return Order(partial(pair_rows, pairs), len(pairs), 64 * batch_size, seed)


def packed_order(examples, max_length: int, window: int, seed: int) -> Order:
    """(unscored ids, scored ids) examples in packed rows, `window` examples packed together."""
    return Order(partial(packed_rows, examples, max_length), len(examples), window, seed)
