"""Token rows to batches: padding, pairs with their prompt computed once, packing, the order.

Two layouts of a pair give the same log-probabilities. The plain one, `answer_rows`, has a row for
each answer; training uses `pair_batch`, where chosen and rejected share a row and its prompt.

`Batches` is the order in which training sees the data, whether they fit into memory or not. There a
row is {index of an example: its tokens}: one pair, or the texts that are packed together.
"""

import itertools
import math
import random
from array import array
from dataclasses import dataclass
from functools import partial

import torch

from dpo_minimal import InputError
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
    None of `lengths` may be above max_length.
    """
    rows_by_room = [[] for _ in range(max_length + 1)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((r for r in range(lengths[i], max_length) if rows_by_room[r]), max_length)
        row = rows_by_room[room].pop() if room < max_length else []
        rows_by_room[room - lengths[i]].append(row + [i])
    return [row for rows in rows_by_room for row in rows]


def packed_batch(examples, rows, device) -> Batch:
    """Packed rows as one batch. examples: (unscored ids, scored ids) by number; rows: numbers.

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


def collate_pairs(rows: list[dict[int, EncodedPair]], device) -> Batch:
    """Rows of one pair each as a batch."""
    pairs = joined(rows)
    return pair_batch(pairs, list(pairs), device)


def collate_packed(rows: list[dict[int, tuple]], device) -> Batch:
    """Packed rows as a batch."""
    return packed_batch(joined(rows), rows, device)


def pair_rows(pairs, indices) -> list[dict[int, EncodedPair]]:
    """The pairs at `indices` that fit, each a row, sorted by length: neighbours need little pad."""
    rows = [{i: pairs[i]} for i in indices]
    return sorted((row for row in rows if fits(row)), key=lambda row: pair_lengths(row.values()))


def packed_rows(examples, max_length: int, indices) -> list[dict[int, tuple]]:
    """The (unscored ids, scored ids) examples at `indices` that fit, packed into rows."""
    rows = [{i: examples[i]} for i in indices]
    texts = [item for row in rows if fits(row) for item in row.items()]
    lengths = [len(unscored) + len(scored) for _, (unscored, scored) in texts]
    # By the place of the longest text in the shuffled `indices`: as random as that, not by length.
    packed = sorted(pack(lengths, max_length))
    return [dict(texts[k] for k in row) for row in packed]


def fits(row: dict) -> bool:
    """Whether the one example of a row was not too long (None instead of tokens)."""
    return None not in row.values()


def joined(rows: list[dict]) -> dict:
    """Several rows as one {index: tokens}, in order."""
    return {i: tokens for row in rows for i, tokens in row.items()}


def windows(n: int, size: int, seed: int):
    """Yield arrays of indices for ever: each epoch's shuffle of 0 ... n - 1, `size` at a time."""
    for epoch in itertools.count():
        order = array("q", range(n))
        random.Random(f"{seed}, epoch {epoch}").shuffle(order)
        yield from (order[at : at + size] for at in range(0, n, size))


class Batches:
    """Batches for ever, each a list of rows; every epoch sees every example once, in a new order.

    The shuffled indices of an epoch are cut into windows of `size`. form(indices) makes a window's
    rows, which are cut into batches, and these are shuffled. Only then is the window in tokens.
    The order depends on the seed alone: not on how often it is read, nor on torch's state.
    """

    def __init__(self, form, n: int, size: int, seed: int, batch_size: int = 1):
        self.form, self.n, self.size = form, n, min(n, size)
        self.seed, self.batch_size = seed, batch_size
        self.place = 0, 0  # (windows, batches of the next one) that were read; may be set
        self.first = form(next(windows(n, self.size, seed)))
        if not self.first:
            raise InputError(f"all of {self.size} random examples are longer than --max-length")

    def num_rows(self) -> int:
        """Rows of an epoch, if all windows are like the first: exact unless some texts drop out."""
        return math.ceil(len(self.first) * self.n / self.size)

    def num_batches(self) -> int:
        """Batches of an epoch, in the same sense."""
        return math.ceil(math.ceil(len(self.first) / self.batch_size) * self.n / self.size)

    def __iter__(self):
        first, read = self.place
        numbered = enumerate(windows(self.n, self.size, self.seed))
        for number, indices in itertools.islice(numbered, first, None):
            rows = self.form(indices) if number else self.first  # nothing is tokenized twice
            starts = list(range(0, len(rows), self.batch_size))
            random.Random(f"{self.seed}, window {number}").shuffle(starts)
            for at in starts[read:]:
                self.place = number, (read := read + 1)
                yield rows[at : at + self.batch_size]
            read = 0


def pair_batches(pairs, batch_size: int, seed: int) -> Batches:
    """Pairs in batches of similar lengths: each is a row, sorted within windows of 64 batches."""
    return Batches(partial(pair_rows, pairs), len(pairs), 64 * batch_size, seed, batch_size)


def packed_batches(examples, max_length: int, seed: int) -> Batches:
    """(unscored ids, scored ids) examples in packed rows; `batch_size` is still to be set.

    Those in memory are packed all together, others as many at a time as take seconds to tokenize.
    """
    size = len(examples) if isinstance(examples, list) else 1024
    return Batches(partial(packed_rows, examples, max_length), len(examples), size, seed)
