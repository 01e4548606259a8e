"""The cases of replay.py that are about weights, adapters, generate, Parquet: rows 11 to 13, 17."""

import json
import shutil
import struct

import torch
from replay import Case, Skip, launch, ran, refused
from replay_cases import with_verdict
from replay_inputs import GOOD_ROW

from dpo_minimal.checkpoint import load_llama, save_adapter
from dpo_minimal.lora import add_adapter


def weight_cases() -> list[Case]:
    """All of them."""
    return weights() + adapters() + asking() + parquet() + large()


# 11. Weights and adapters.


def weights():
    def header(change):
        """Change a safetensors file's header, given as (pairs of name and entry)."""

        def damage(folder):
            path = folder / "model.safetensors"
            raw = path.read_bytes()
            size = struct.unpack("<Q", raw[:8])[0]
            pairs = change(list(json.loads(raw[8 : 8 + size]).items()))
            text = "{" + ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs) + "}"
            path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[8 + size :])

        return damage

    def entry(**changes):
        return header(lambda pairs: [*pairs[:-1], (pairs[-1][0], pairs[-1][1] | changes)])

    def overlap(pairs):
        same = pairs[-1][1] | {
            "data_offsets": next(
                v["data_offsets"] for k, v in pairs[:-1] if v.get("shape") == pairs[-1][1]["shape"]
            )
        }
        return [*pairs[:-1], (pairs[-1][0], same)]  # fmt: skip

    def binary(value):
        def damage(folder):
            (folder / "model.safetensors").unlink()
            torch.save(value, folder / "pytorch_model.bin")

        return damage

    def null_map(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": null}')

    damages = {
        "odd offsets": entry(data_offsets=[1, 4]),
        "offsets that are text": entry(data_offsets="x"),
        "overlapping tensors": header(overlap),
        "a name twice": header(lambda pairs: [*pairs, pairs[-1]]),
        "integers": entry(dtype="I32"),
        "truth values": entry(dtype="BOOL"),
        "complex numbers": entry(dtype="C64"),
        '"weight_map": null': null_map,
        ".bin: a nested dict": binary({"model": {"x": torch.ones(2)}}),
        ".bin: no tensors": binary({"model.norm.weight": "x"}),
    }

    def case(name, damage):
        def try_it(place):
            damage(place.model)
            return with_verdict(place.train(*place.flags()))

        return Case(11, f"weights: {name}", try_it)

    return [case(name, damage) for name, damage in damages.items()]


def adapters():
    def case(changes):
        def try_it(place):
            model = load_llama(place.model)
            add_adapter(model, "sft", r=2)
            folder = place.folder / "adapter"
            save_adapter(model, ["sft"], folder)
            path = folder / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
            return with_verdict(place.train(*place.flags("--sft-adapter", folder)))

        return Case(11, f"adapter: {json.dumps(changes)}", try_it)

    changes = [{"r": r} for r in (0, -1, 1.5, 10**9)] + [{"lora_alpha": float("nan")}]
    return [case(c) for c in [*changes, {"target_modules": ["q_proj", "v_proj", "up_proj"]}]]


# 12. generate.


def asking():
    def case(words, wanted=None):
        def try_it(place):
            ask = ["-m", "dpo_minimal.generate", "--model", place.model, "--max-new-tokens", 4]
            # Anew, because a copy of this process has the module already.
            done = launch(place.folder, [*ask, "--prompt", "Is it?", *words], real=True)
            return done, refused(done) if wanted is None else ran(done)

        return Case(12, f"generate {' '.join(map(ascii, words))[:40]}", try_it)

    flags = ["--top-p 0", "--top-p -1", "--temperature nan", "--seed 1" + 20 * "0"]
    cases = [case(words.split()) for words in flags]
    cases.append(case(["--temperature", "1e-45"]))
    cases.append(case(["--device", "cpu"], "runs"))
    return cases + [case(["--prompt", "\udcff"]), case(["--prompt", "Is it? " * 200])]


# 13. Parquet.


def parquet():
    def case(name, damage):
        def try_it(place):
            try:
                import pyarrow
                import pyarrow.parquet
            except ImportError:
                raise Skip("needs pyarrow") from None
            path = place.folder / "pairs.parquet"
            table = pyarrow.Table.from_pylist([GOOD_ROW] * 30)
            pyarrow.parquet.write_table(table, path)
            path.write_bytes(damage(path.read_bytes()))
            return with_verdict(place.train(*place.flags("--data", path)), path.name)

        return Case(13, f"Parquet: {name}", try_it)

    def at(share, text):
        return lambda raw: (
            raw[: int(len(raw) * share)] + text + raw[int(len(raw) * share) + len(text) :]
        )

    damages = {
        "text that is not UTF-8": lambda raw: raw.replace(b"Yes, it", b"Y\xff\xfe, it"),
        "a column's name that is not UTF-8": lambda raw: raw.replace(b"chosen", b"ch\xffsen"),
        "cut off": lambda raw: raw[:-30],
        "empty": lambda raw: b"",
        "foreign": lambda raw: b"PAR1" + b"hello " * 50 + b"PAR1",
    }
    damages |= {f"damaged at {s:.0%}": at(s, b"\x99" * 9) for s in (0.02, 0.1, 0.4, 0.7, 0.9)}
    return [case(name, damage) for name, damage in damages.items()]


# 17. Large.


def large():
    def long_row(place):
        rows = [GOOD_ROW | {"prompt": f"Is it {n}?"} for n in range(24)]
        rows[3] = rows[3] | {"chosen": "Yes, it is. " * 850_000}
        place.data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        done = place.train(*place.flags())
        rows[3] = GOOD_ROW
        place.data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        shutil.rmtree(place.out)
        usual = place.train(*place.flags())
        cpu, more = done.cpu - usual.cpu, done.megabytes - usual.megabytes
        done.err += f"{cpu:.1f} CPU-seconds and {more:.0f} MB more than without it\n"
        return done, ran(done) or ("" if cpu < 3 and more < 300 else "too much")

    return [Case(17, "a row of 10 MB", long_row)]
