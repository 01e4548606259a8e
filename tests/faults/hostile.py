"""Hostile bytes, seeded: JSON values, JSON texts and files with one or two things wrong."""

import copy
import json
import math
import random

VALUES = [None, True, False, 0, -1, 1, 2, 3, 1.5, -0.5, 1e-300, 1e300, math.nan, math.inf]
VALUES += [-math.inf, 2**31, 2**63, 10**12, 10**400, "", "16", "x", "a\nb\n\nc", "\ud800", "\0"]
VALUES += [[], [1], [None], [[]], {}, {"a": 1}, "../x", "é\u2028\u202e", "x" * 3000]


def places(value, path=()):
    """The paths of all values within a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, item in inner:
        yield from places(item, (*path, key))


def change_json(rng: random.Random, value, most=2):
    """A copy of a JSON value in which up to `most` places differ."""
    root = {"": copy.deepcopy(value)}
    for _ in range(rng.randint(1, most)):
        *path, key = rng.choice(list(places(root[""], ("",))))
        inner = root
        for step in path:
            inner = inner[step]
        how, old = rng.random(), inner[key]
        if how < 0.15 and path:
            del inner[key]
        elif how < 0.3 and isinstance(old, dict):
            old[rng.choice(["unknown", "a b", "é", *old])] = rng.choice(VALUES)
        elif how < 0.5 and type(old) in (int, float) and -1e15 < old < 1e15:
            inner[key] = rng.choice([old + 1, old - 1, -old, old * 2, old / 2, str(old), old * 1e9])
        elif how < 0.6 and isinstance(inner, dict) and len(inner) > 1:
            inner[key] = copy.deepcopy(inner[rng.choice(list(inner))])
        else:
            inner[key] = copy.deepcopy(rng.choice(VALUES))
    return root[""]


def json_bytes(rng: random.Random, value) -> bytes:
    """The text of a JSON value, in one of ten cases with something wrong in the text itself."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    data = text.encode("utf-8", "surrogatepass")
    how = rng.randrange(80)
    if how == 0:
        return b"\xef\xbb\xbf" + data
    if how == 1:
        return data[: rng.randrange(len(data))]
    if how == 2:
        return data.replace(b"{", b'{"vocab_size": 7, "a": 1, "a": 2, ', 1)
    if how == 3:
        return data.replace(b": ", b": " + b"[" * 2000 + b"]" * 2000 + b', "b": ', 1)
    if how == 4:
        return data.replace(b": ", b": " + b"9" * 5000 + b', "b": ', 1)
    if how == 5:
        return change_bytes(rng, data)
    if how == 6:
        return rng.choice([b"", b"[]", b"null", b"3", b'"x"', b"{}", b"\xff\xfe", b"\0" * 100])
    if how == 7:
        return text.encode("utf-16", "surrogatepass")
    return data


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one of them changed, some cut out, repeated or put in, or the end missing."""
    data, at = bytearray(data), rng.randrange(max(1, len(data)))
    how, length = rng.randrange(6), rng.choice([1, 2, 8, 100])
    if how == 0 and data:
        data[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[at:]
    elif how == 2:
        del data[at : at + length]
    elif how == 3:
        data[at:at] = rng.randbytes(length)
    elif how == 4:
        data[at:at] = data[at : at + length]
    else:
        data += rng.choice([b"\0", b"\n", rng.randbytes(length)])
    return bytes(data)
