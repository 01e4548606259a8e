"""More readers under fuzz, as in readers.py: data rows, what is no file, a run's own files."""

import gzip
import io
import json
import os
import shutil

import hostile
import spec
import torch
from readers_text import EITHER, config

from dpo_minimal import log, loop
from dpo_minimal.data import read_pairs
from dpo_minimal.formats.huggingface import load_llama
from dpo_minimal.tokenizer import load_tokenizer


def quiet(text):
    """A log that nobody reads."""


# --- data rows --------------------------------------------------------------------------------

GOOD_ROWS = [
    {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."},
    {"instruction": "Sum up", "input": "1 2", "chosen": "3", "rejected": "4"},
    {"question": "Why?", "response_j": "So.", "response_k": "Not so."},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "é中😀", "chosen": " a\u2028b ", "rejected": "x" * 50, "score": 3},
]


def rows_either(rows) -> bool:
    """Whether some row has lists or objects for texts: conversations, a matter of their own."""
    names = {"prompt", "chosen", "rejected", "messages", "conversations"}
    rows = [row for row in rows if isinstance(row, dict)]
    if any({"question", "chosen"} <= row.keys() for row in rows):  # a mixture of two forms
        return True
    return any(isinstance(row.get(name), (list, dict)) for row in rows for name in names)


def json_rows(rng, folder, good, bad):
    """`read_pairs` of JSON Lines or an array, gzipped or not."""
    rows = rng.sample(GOOD_ROWS, rng.randint(1, 5))
    rows = hostile.change_json(rng, rows) if bad else rows
    array = rng.random() < 0.3 or not isinstance(rows, list)
    values = [rows] if array else rows
    lines = [hostile.json_bytes(rng, v) if bad else json.dumps(v).encode() for v in values]
    data = b"\n".join(lines)
    if bad and rng.random() < 0.02:
        data = json.dumps({"prompt": "a", "chosen": "b " * 5_000_000, "rejected": "c"}).encode()
    if bad and rng.random() < 0.02:
        data = b" " * 400_000_000 if rng.random() < 0.5 else b'{"prompt": "' + b"a" * 400_000_000
    zipped = rng.random() < 0.3 or len(data) > 10**8
    path = folder / rng.choice(["x.jsonl", "x.json", "x.jsonl.gz", "x.txt"])
    raw = gzip.compress(data, 1) if zipped else data
    path.write_bytes(hostile.change_bytes(rng, raw) if bad and rng.random() < 0.1 else raw)

    def expect():
        data = path.read_bytes()
        try:
            text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
            spec.need(len(text) < 10**8, "a row without end")
            text = io.StringIO(text.decode("utf-8"), newline=None).read()
            if text.lstrip()[:1] == "[":
                values = json.loads(text)
            else:
                values = [json.loads(line) for line in text.split("\n") if line.strip()]
        except spec.Refuse:
            raise
        except Exception as error:
            raise spec.Refuse(str(error)) from None
        return EITHER if rows_either(values) else spec.pairs(values)

    return lambda: [tuple(pair) for pair in read_pairs(path, quiet)], expect


def parquet(rng, folder, good, bad):
    """`read_pairs` of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    rows, path = [dict(GOOD_ROWS[0], n=i) for i in range(20)], folder / "x.parquet"
    column = rng.choice(["prompt", "chosen", "rejected"])
    if bad and rng.random() < 0.3:
        odd = [None, 3, 1.5, b"\xff\xfe", ["a"], {"a": "b"}, True]
        rows = [rows[0] | {column: rng.choice(odd)}] * 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    if bad and len(rows) == 20:
        path.write_bytes(hostile.change_bytes(rng, path.read_bytes()))

    def expect():
        try:
            table = pyarrow.parquet.read_table(path, use_threads=False).to_pylist()
        except Exception as error:
            raise spec.Refuse(str(error)) from None
        return EITHER if rows_either(table) else spec.pairs(table)

    return lambda: [tuple(pair) for pair in read_pairs(path, quiet)], expect


# --- what is no file, and a run's own files ---------------------------------------------------


def no_file(rng, folder, good, bad):
    """A pipe, a device, a folder, a socket or nothing where a file should be."""
    if not bad:
        return config(rng, folder, good, bad)
    kinds = ["config.json", "tokenizer.model", "tokenizer.json", "rows.jsonl", "rows.parquet"]
    kinds += ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    name = rng.choice(kinds)
    if name not in ("config.json", "rows.jsonl", "rows.parquet"):
        shutil.copy(good / "model" / "config.json", folder)
    path, how = folder / name, rng.choice(["pipe", "zero", "random", "folder", "dangling", "loop"])
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    else:
        targets = {"zero": "/dev/zero", "random": "/dev/urandom", "dangling": "nowhere"}
        path.symlink_to(targets.get(how, name))

    def read():
        if name.startswith("rows"):
            return list(read_pairs(path, quiet))
        return load_tokenizer(folder) if "tokenizer" in name else load_llama(folder)

    def expect():
        raise spec.Refuse(how)

    return read, expect


def state(rng, folder, good, bad):
    """`load_state`: the weights of a saved state."""

    def fresh(n=3):
        model = torch.nn.Linear(n, 2)
        return model, torch.optim.AdamW(model.parameters()), {"training": torch.ones(4, 2)}

    torch.manual_seed(rng.randrange(9))
    path, (model, optimizer, tables) = folder / "state" / "dpo.pt", fresh(4 if bad else 3)
    foreign = bad and rng.random() < 0.3  # a sealed file, but of another run
    if bad and not foreign:
        model, optimizer, tables = fresh()
    loop.save_state(path, model, optimizer, tables, (3, 5, (0, 1)))
    whole = path.read_bytes()
    if bad and not foreign:
        path.write_bytes(hostile.change_bytes(rng, whole))

    def read():
        model, optimizer, tables = fresh()
        reached = loop.load_state(path, model, optimizer, tables)
        return list(reached[:2]), model.weight.detach().numpy()

    def expect():
        spec.need(path.read_bytes() == whole and not foreign)
        return [3, 5], model.weight.detach().numpy()

    return read, expect


def metrics(rng, folder, good, bad):
    """`rewind` of a metrics.jsonl: the rows that are kept."""
    rows = [{"stage": s, "step": i, "loss": 0.5} for s in ("sft", "dpo") for i in range(4)]
    rows = [hostile.change_json(rng, row) if bad and rng.random() < 0.3 else row for row in rows]
    lines = [hostile.json_bytes(rng, row) if bad else json.dumps(row).encode() for row in rows]
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))

    def read():
        log.rewind(path, "dpo", 2)
        return [json.loads(line) for line in path.read_text().splitlines()]

    return (
        read,
        lambda: EITHER if bad else [r for r in rows if r["stage"] == "sft" or r["step"] < 2],
    )
