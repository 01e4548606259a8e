"""The cases of replay.py that are about what is read: rows 4 to 7, 9 to 14 and 17."""

import json
import shutil
import struct

import torch
from replay import Case, Skip, launch, ran, refused
from replay_cases import flag_case, with_verdict

from dpo_minimal import forum
from dpo_minimal.checkpoint import load_llama, save_adapter
from dpo_minimal.lora import add_adapter
from dpo_minimal.tokenizer import train_tokenizer

GOOD_ROW = {"prompt": "Is it?", "chosen": "Yes, it is.", "rejected": "No."}
BAD_FLAGS = [
    "--epochs nan", "--epochs inf", "--lora-dropout 2", "--lora-dropout -1", "--lora-dropout nan",
    "--seed 1" + 21 * "0", "--device x", "--device mps", "--lora-r 1000000000", "--out /proc/run",
    "--out " + 300 * "x", "--learning-rate -1", "--epochs 0", "--epochs -1", "--warmup-steps -1",
    "--eval-every -5", "--save-every -1", "--grad-accum 1000000000", "--max-length 1000000000",
]  # fmt: skip
BAD_CONFIG = [
    {"vocab_size": "420"}, {"hidden_size": [16]}, {"intermediate_size": 0}, {"hidden_size": -16},
    {"num_attention_heads": {}}, {"num_key_value_heads": 3}, {"num_hidden_layers": 10**9},
    {"rms_norm_eps": -1}, {"rope_theta": float("nan")}, {"head_dim": "4"}, {"model_type": 3},
    {"rope_scaling": "x"}, {"tie_word_embeddings": "no"}, {"max_position_embeddings": "256"},
]  # fmt: skip
BAD_PARAMS = [{"dim": "16"}, {"n_layers": 10**9}, {"n_heads": 0}, {"norm_eps": -1}, {"dim": []}]


def input_cases() -> list[Case]:
    """All of them."""
    cases = rows_of_text() + models() + [flag_case(6, words) for words in BAD_FLAGS]
    cases.append(Case(6, "--max-length above the context: a warning", long_rows))
    return cases + jsons() + tokenizers() + weights() + adapters() + asking() + parquet() + large()


# 4, 14. Rows.


def rows_case(row: int, name: str, rows, says: str | None = "", flags=()):
    """Data of these rows are refused; says: None if they are to be trained on instead."""

    def try_it(place):
        place.data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        done = place.train(*place.flags(*flags))
        return done, ran(done) if says is None else refused(done, says)

    return Case(row, name, try_it)


def said(text):
    return [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": text}]


def rows_of_text():
    messages = [{"chosen": said(f"Yes {n}."), "rejected": said("No.")} for n in range(24)]
    place = "line 2"
    cases = [rows_case(4, "messages without a prompt: they are trained on", messages, None)]
    for wrong in (None, 3, [], [3], [{"role": "user"}], [{"role": "user", "content": None}]):
        rows = [messages[0], {"chosen": wrong, "rejected": said("No.")}, *messages]
        cases.append(rows_case(4, f"messages: chosen is {json.dumps(wrong)}", rows, place))
    odd = [GOOD_ROW, {"instruction": "Sum up.", "input": {"a": 1}, "chosen": "b", "rejected": "c"}]
    few = [GOOD_ROW | {"prompt": f"Is it {n}?"} for n in range(17)]
    cases.append(rows_case(14, '"input": {"a": 1}', odd, place))
    return cases + [Case(14, "17 pairs: a warning", lambda place: warned(place, few))]


def warned(place, rows):
    place.data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = place.train(*place.flags())
    return done, ran(done, "warning")


def long_rows(place):
    done = place.train(*place.flags("--max-length", 200, "--max-steps", 1))
    return done, ran(done, "longer than the model's context of 128 tokens")


# 5, 7. Models.


def config_case(row: int, changes: dict, says=None):
    """A config.json with these changes is refused."""

    def try_it(place):
        path = place.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return with_verdict(place.train(*place.flags()), next(iter(changes)))

    return Case(row, f"config.json: {json.dumps(changes)}", try_it)


def models():
    def backup(place):
        shutil.copytree(place.model, place.model / "tokenizer_backup")
        done = place.train(*place.flags())
        return done, ran(done)

    def larger(place):
        threads = [
            " ".join(row["response_j"] + row["response_k"]) for row in forum.make_forum(0)["rl"]
        ]
        words = [row["response_j"] + row["question"] for row in forum.make_forum(0)["rl"]]
        train_tokenizer(threads + words, 480, place.model / "tokenizer.model")
        return with_verdict(place.train(*place.flags()), "the tokenizer's last id is 479")

    def no_bos(place):
        import sentencepiece

        text = place.folder / "text"
        text.write_text("\n".join(row["response_j"] for row in forum.make_forum(0)["rl"]))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(place.model / "tokenizer"), vocab_size=200, bos_id=-1,
            eos_id=-1, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        return with_verdict(place.train(*place.flags()), "BOS is -1")

    def silent(place):
        path = place.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": None}))
        done = place.train(*place.flags())
        return done, ran(done)

    def params(changes):
        def try_it(place):
            from test_checkpoint import meta_folder

            model = load_llama(place.model, quantize=None)
            folder = meta_folder(model, place.folder / "meta")
            good = json.loads((folder / "params.json").read_text())
            (folder / "params.json").write_text(json.dumps(good | changes))
            shutil.copy(place.model / "tokenizer.model", folder)
            return with_verdict(place.train(*place.flags("--model", folder)))

        return Case(7, f"params.json: {json.dumps(changes)}", try_it)

    cases = [config_case(5, BAD_CONFIG[-1]), Case(5, "a folder tokenizer_backup/ in it", backup)]
    cases += [Case(5, "a tokenizer with more ids", larger), Case(5, "no BOS, no EOS", no_bos)]
    cases += [config_case(7, changes) for changes in BAD_CONFIG[:-1]]
    cases += [Case(7, '"architectures": null says nothing', silent)]
    return cases + [params(changes) for changes in BAD_PARAMS]


# 9, 10. JSON that nobody means; tokenizer_config.json.


def text_case(row: int, name: str, file: str, text: str):
    """A file of the model, or the data, with this text is refused."""

    def try_it(place):
        path = place.data if file == "data" else place.model / file
        path.write_text(text, "utf-8")
        return with_verdict(place.train(*place.flags()))

    return Case(row, f"{file}: {name}", try_it)


def jsons():
    texts = {
        "1,200 levels": "[" * 1200 + "]" * 1200,
        "5,000 digits": '{"prompt": ' + 5000 * "9" + "}",
    }
    files = ("data", "config.json")
    return [text_case(9, name, file, text) for file in files for name, text in texts.items()]


def json_tokenizer(place):
    """Give the model a tokenizer.json in place of its tokenizer.model."""
    try:
        from tokenizers import Tokenizer, models
    except ImportError:
        raise Skip("needs tokenizers") from None
    (place.model / "tokenizer.model").unlink()
    words = {"<s>": 0, "</s>": 1, "a": 2}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(place.model / "tokenizer.json"))


def tokenizers():
    def case(row, name, file, text):
        def try_it(place):
            json_tokenizer(place)
            (place.model / file).write_text(text, "utf-8")
            return with_verdict(place.train(*place.flags()), file)

        return Case(row, f"{file}: {name}", try_it)

    texts = ["", "{", "[]", '{"bos_token": 1}', "[" * 1200 + "]" * 1200]
    cases = [case(10, text[:20] or "empty", "tokenizer_config.json", text) for text in texts]
    cases.append(case(10, "a byte order mark", "tokenizer_config.json", "\ufeff{}"))
    word = {"type": "WordPiece", "vocab": {}, "unk_token": "x", "continuing_subword_prefix": 3}
    broken = [{"model": word}, {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": [3]}}, []]
    return cases + [case(17, json.dumps(b)[:30], "tokenizer.json", json.dumps(b)) for b in broken]


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
            done = launch(place.folder, [*ask, "--prompt", "Is it?", *words])
            return done, refused(done) if wanted is None else ran(done)

        return Case(12, f"generate {' '.join(map(ascii, words))[:40]}", try_it)

    flags = ["--top-p 0", "--top-p -1", "--temperature nan", "--seed 1" + 20 * "0"]
    cases = [case(words.split()) for words in flags]
    cases.append(case(["--temperature", "1e-45"], "runs"))
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
