"""Preference pairs by the million: texts that stay on disk, and tokens that are made on demand.

`load_splits`, `encode_sft` and `encode_pairs` do what those of data.py do, for data of any size.
They return lists, or other sequences if the data are large; a reader of them need not know which.
"""

import random
import tempfile
from array import array
from collections.abc import Sequence
from functools import partial

from dpo_minimal import InputError, data
from dpo_minimal.data import PreferencePair
from dpo_minimal.extras import progress
from dpo_minimal.formats.conversations import pack_prompt, unpack_prompt

# Bytes of text that are kept and tokenized at once, in memory: that takes 3 seconds and 300 MB,
# because a token is a Python number of 36 bytes. Of more texts, tokens are made when they are
# needed, and forgotten.
SMALL = 16_000_000
WINDOW = 1024  # texts on demand that are packed together; tokenizing them takes about a second
CACHED = 2048  # encoded texts that are remembered: the window of 64 batches of up to 32 pairs


def num_bytes(pair: PreferencePair) -> int:
    """The size of a pair's texts in UTF-8."""
    return sum(map(len, as_bytes(pair)))


def as_bytes(pair: PreferencePair) -> list[bytes]:
    """A pair's three parts in UTF-8, also of a prompt that is a conversation."""
    return [text.encode() for text in (pack_prompt(pair.prompt), pair.chosen, pair.rejected)]


def is_large(pairs) -> bool:
    """Whether the texts come to more than SMALL bytes. Reads no more of them than that."""
    size = 0
    for pair in pairs:
        size += num_bytes(pair)
        if size > SMALL:
            return True
    return False


class PairsOnDisk(Sequence):
    """Preference pairs in a temporary file: `append` writes one, pairs[3] reads the fourth.

    24 bytes per pair are in memory. folder: whose disk to use, if not that of the system's
    temporary files. The file has no name and goes with the process, however that ends.
    """

    def __init__(self, folder=None):
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as we are)
        self.ends = array("q", [0])  # byte after each text, three per pair; the first starts at 0

    def append(self, pair: PreferencePair):
        """Write a pair behind the others. InputError if the disk is full."""
        texts = as_bytes(pair)
        try:
            self.file.write(b"".join(texts))
        except OSError as error:
            raise InputError(f"no room on disk to copy the texts ({error.strerror})") from None
        for text in texts:
            self.ends.append(self.ends[-1] + len(text))

    def __len__(self):
        return len(self.ends) // 3

    def __getitem__(self, i: int) -> PreferencePair:
        if i < 0:
            i += len(self)
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, a, b, end = self.ends[3 * i : 3 * i + 4]
        self.file.seek(start)
        data = self.file.read(end - start)
        a, b = a - start, b - start  # where the chosen and the rejected answer begin
        prompt = unpack_prompt(data[:a].decode())
        return PreferencePair(prompt, data[a:b].decode(), data[b:].decode())


def keep(pairs, folder=None) -> Sequence[PreferencePair]:
    """The pairs of an iterator: a list, or `PairsOnDisk` if they turn out to be large."""
    in_memory, size = [], 0
    for pair in pairs:
        in_memory.append(pair)
        size += num_bytes(pair)
        if size > SMALL:
            break
    else:
        return in_memory
    on_disk = PairsOnDisk(folder)
    for pair in in_memory:
        on_disk.append(pair)
    for done, pair in enumerate(pairs):  # goes on behind those
        progress.show("reading large data", done, None, "more pairs so far")
        on_disk.append(pair)
    return on_disk


def load_splits(path, eval_data, seed: int, log, folder) -> data.Splits:
    """`data.load_splits`; large texts go to a temporary file on the disk of `folder`.

    Of a large evaluation file only MAX_HELD_OUT pairs are used, because all would take hours.
    """
    splits = data.load_splits(path, eval_data, seed, log, keep=partial(keep, folder=folder))
    held_out, most = splits.evaluation, data.MAX_HELD_OUT
    if len(held_out) <= most or not is_large(held_out):
        return splits
    log(f"evaluation on {most} of {len(held_out)} held-out pairs")
    chosen = sorted(random.Random(seed).sample(range(len(held_out)), most))
    return splits._replace(evaluation=data.Subset(held_out, chosen))


class TokensOnDemand(Sequence):
    """Pairs that are tokenized when asked for: tokens[3] encodes the fourth; None is too long.

    The CACHED latest ones are remembered, so that a window's pairs are tokenized once: for their
    lengths, which decide on the batches, and again for each batch. `log` is told when 1, 10,
    100, ... pairs were too long: so a log shows their share and stays short.
    """

    def __init__(self, encode, pairs, max_length: int, what: str, log=print):
        self.encode, self.pairs, self.max_length = encode, pairs, max_length
        self.what, self.log, self.asked, self.dropped = what, log, 0, 0
        self.cache = {}  # index: token ids, or None if too long
        log(f"{what}: {len(pairs)}, tokenized as they are needed")

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i: int):
        if i not in self.cache:
            tokens = self.encode(self.pairs[i])
            self.count(tokens)
            if len(self.cache) == CACHED:
                del self.cache[next(iter(self.cache))]  # the oldest
            self.cache[i] = tokens
        return self.cache[i]

    def count(self, tokens):
        """Count a pair, and tell the log if it is too long (None)."""
        self.asked += 1
        if tokens is not None:
            return
        self.dropped += 1
        power_of_ten = self.dropped == 10 ** (len(str(self.dropped)) - 1)
        if power_of_ten:
            so_far = f"dropped {self.dropped} of {self.asked} so far"
            self.log(f"{self.what}: {so_far}, longer than {self.max_length} tokens")


def encode_pairs(tokenizer, pairs, max_length: int, what: str, log=print):
    """`data.encode_pairs`, or, of large pairs, `TokensOnDemand`."""
    if not is_large(pairs):
        return data.encode_pairs(tokenizer, pairs, max_length, what, log)
    encode = partial(data.encode_pair, tokenizer, max_length=max_length)
    return TokensOnDemand(encode, pairs, max_length, what, log)


def encode_sft(tokenizer, pairs, max_length: int, log=print):
    """(what SFT learns from the pairs, in tokens; how many texts to pack together)."""
    if not is_large(pairs):
        texts = data.encode_sft(tokenizer, pairs, max_length, log)
        return texts, len(texts)
    encode = partial(data.encode_text, tokenizer, max_length=max_length)
    return TokensOnDemand(encode, pairs, max_length, "SFT texts", log), WINDOW
