"""Texts kept on disk: preference pairs by the million, of which only some bytes are in memory.

A file is read once, from beginning to end; the texts of each pair go to a temporary file and are
read back one by one when they are needed. In memory are 40 bytes a pair: where its texts are, and
hashes that tell equal questions and equal texts without reading them again.
"""

import hashlib
import tempfile
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_minimal import InputError


class PreferencePair(NamedTuple):
    """A question and two answers to it, as text; people preferred `chosen` to `rejected`."""

    prompt: str
    chosen: str
    rejected: str


def hash64(data: bytes) -> bytes:
    """8 bytes. Among a million texts, two different ones share them once in 37 million runs."""
    return hashlib.blake2b(data, digest_size=8).digest()  # Python's own hash differs by process


class PairStore:
    """Preference pairs in a temporary file: `append` writes one, store[3] reads the fourth.

    folder: whose disk to use, if not that of the system's temporary files. The file has no name
    and goes with the process, however that ends.
    """

    def __init__(self, folder=None):
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as we)
        self.ends = array("q", [0])  # byte after each text, three a pair; the first starts at 0
        self.questions = array("Q")  # a hash of each prompt
        self.texts = array("Q")  # a hash of each prompt and its chosen answer: what SFT learns
        self.digest = hashlib.blake2b()  # of all bytes

    def append(self, pair: PreferencePair):
        """Write a pair behind the others. UnicodeEncodeError if a text is not valid Unicode."""
        texts = [text.encode() for text in pair]
        data = b"".join(texts)
        try:
            self.file.write(data)
        except OSError as error:
            raise InputError(f"no room on disk to copy the texts ({error.strerror})") from None
        for text in texts:
            self.ends.append(self.ends[-1] + len(text))
        question = hash64(texts[0])
        self.questions.frombytes(question)
        self.texts.frombytes(hash64(question + texts[1]))
        self.digest.update(data)

    def __len__(self):
        return len(self.questions)

    def __getitem__(self, i: int) -> PreferencePair:
        start, *ends = self.ends[3 * i : 3 * i + 4]
        self.file.seek(start)
        data = self.file.read(ends[-1] - start)
        a, b, _ = (end - start for end in ends)
        return PreferencePair(data[:a].decode(), data[a:b].decode(), data[b:].decode())


class Pairs(Sequence):
    """Pairs of a store, all or some, in an order of their own: numbers, int64 [n], and no text."""

    def __init__(self, store: PairStore, indices=None):
        self.store = store
        self.indices = np.arange(len(store)) if indices is None else indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        """A PreferencePair read from disk; for a slice, a mask or an array of numbers, `Pairs`."""
        if isinstance(i, (slice, np.ndarray)):
            return Pairs(self.store, self.indices[i])
        return self.store[int(self.indices[i])]

    def num_bytes(self) -> int:
        """The size of the texts."""
        starts = np.array(self.store.ends)[::3]
        return int(np.diff(starts)[self.indices].sum())

    def questions(self) -> np.ndarray:
        """A hash of each pair's prompt, uint64 [n]."""
        return np.array(self.store.questions)[self.indices]

    def each_text_once(self) -> "Pairs":
        """Those whose prompt and chosen answer no earlier pair has."""
        _, first = np.unique(np.array(self.store.texts)[self.indices], return_index=True)
        return self[np.sort(first)]

    def digest(self) -> bytes:
        """A hash of all texts of the store and of which ones these are."""
        digest = self.store.digest.copy()
        digest.update(self.store.ends)
        digest.update(self.indices.tobytes())
        return digest.digest()
