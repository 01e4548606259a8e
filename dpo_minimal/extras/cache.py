"""Sampling keeps the keys and values of earlier tokens, with room for those to come."""


class Cache:
    """The keys and values of one attention layer, with room for more: [B, G, S, K] each."""

    def __init__(self):
        self.size, self.kept = 0, None  # kept: [2, B, G, room, K]

    def extend(self, k, v):
        """All keys and values, [B, G, S, K] each; the new ones, [B, G, T, K] each, come last."""
        start, end = self.size, self.size + k.shape[2]
        room = 0 if self.kept is None else self.kept.shape[3]
        if end > room:  # half as much again, so that it seldom moves
            grown = k.new_empty(2, *k.shape[:2], end + max(64, end // 2), k.shape[3])
            if start:
                grown[:, :, :, :start] = self.kept[:, :, :, :start]
            self.kept = grown
        self.kept[0, :, :, start:end] = k
        self.kept[1, :, :, start:end] = v
        self.size = end
        return self.kept[0, :, :, :end], self.kept[1, :, :, :end]

    def keep(self, rows: list[int]):
        """Forget all other rows of the batch."""
        self.kept = self.kept[:, rows]
