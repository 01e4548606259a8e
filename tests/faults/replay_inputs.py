"""The cases of replay.py that are about what is read: rows 4 to 7, 9, 10, 14 and a part of 17."""

import json
import shutil

from replay import Case, Skip, ran, refused
from replay_cases import flag_case, with_verdict

from dpo_minimal import forum
from dpo_minimal.checkpoint import load_llama
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
    {"num_attention_heads": {}}, {"num_key_value_heads": "3"}, {"num_hidden_layers": 10**9},
    {"rms_norm_eps": -1}, {"rope_theta": float("nan")}, {"head_dim": "4"}, {"model_type": 3},
    {"rope_scaling": "x"}, {"tie_word_embeddings": "no"}, {"max_position_embeddings": "256"},
]  # fmt: skip
BAD_PARAMS = [{"dim": "16"}, {"n_layers": 10**9}, {"n_heads": 0}, {"norm_eps": -1}, {"dim": []}]


def input_cases() -> list[Case]:
    """All of them."""
    cases = rows_of_text() + models() + [flag_case(6, words) for words in BAD_FLAGS]
    cases.append(Case(6, "--max-length above the context: a warning", long_rows))
    return cases + jsons() + tokenizers()


# 4, 14. Rows.


def rows_case(row: int, name: str, rows, says: str | None = "", flags=()):
    """Data of these rows are refused; says: None if they are to be trained on instead."""

    def try_it(place):
        place.data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        done = place.train(*place.flags(*flags))
        return done, ran(done) if says is None else refused(done, says)

    return Case(row, name, try_it)


def said(text, question="Is it?"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": text}]


def rows_of_text():
    questions = [f"Is it {n}?" for n in range(24)]
    messages = [{"chosen": said("Yes.", q), "rejected": said("No.", q)} for q in questions]
    place = "line 2"
    text = ["--template", "qa"]  # the model here has no chat template
    cases = [rows_case(4, "messages without a prompt: they are trained on", messages, None, text)]
    for wrong in (None, 3, [], [3], [{"role": "user"}], [{"role": "user", "content": None}]):
        rows = [messages[0], {"chosen": wrong, "rejected": said("No.")}, *messages]
        cases.append(rows_case(4, f"messages: chosen is {json.dumps(wrong)}", rows, place, text))
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
