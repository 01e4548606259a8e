"""Flags under fuzz: every flag of train.py and of generate with values that make sense or do not.

Which values make sense is said here once more, in other words than in `extras/flags.py`.
"""

import json
import shutil
import sys

import hostile
import spec
from readers_text import EITHER

import train
from dpo_minimal.extras import ask, flags, preflight
from dpo_minimal.formats.huggingface import read_config
from dpo_minimal.run import make_parser, read_run

TEXTS = ["", " ", "x", "a\nb", "\udcff", "-", "é", "x" * 5000, ".", "/", "/proc/x", "/dev/zero"]
NUMBERS = ["0", "-1", "1", "2", "3", "0.5", "0.05", "1e-3", "1.5", "nan", "inf", "-inf", "1e30"]
NUMBERS += ["1e-45", "10000000000", "9" * 30, "0x10", "1,000", "²", "٣", "True", "None", "1" * 5000]


def whole(low, high=2**20):
    """A whole number in a range."""
    return lambda text: int(text) if low <= int(text) <= high else 1 / 0


def number(is_right):
    """A number for which a condition holds."""
    return lambda text: float(text) if is_right(float(text)) else 1 / 0


def one_of(*words):
    """One of some words."""
    return lambda text: text if text in words else 1 / 0


def text(value):
    """A text that is not empty and can be written down."""
    value.encode()
    return value if value.strip() else 1 / 0


TRAIN = {
    "model": text,
    "data": text,
    "eval-data": text,
    "out": text,
    "reuse": text,
    "sft-adapter": text,
    "target-modules": one_of("all", "q_proj", "q_proj,v_proj", "up_proj"),
    "stage": one_of("pretrain", "sft", "dpo", "evaluate"),
    "preset": one_of("forum", "usual", "stack-llama-2"),
    "loss": one_of("sigmoid", "ipo", "hinge", "robust", "apo_zero", "kto", "simpo", "orpo"),
    "dtype": one_of("float32", "bfloat16"),
    "device": one_of("cpu"),
    "beta": number(lambda x: 0 < x <= 1e9),
    "label-smoothing": number(lambda x: 0 <= x < 0.5),
    "simpo-gamma": number(lambda x: 0 <= x <= 1e9),
    "nll-weight": number(lambda x: 0 <= x <= 1e9),
    "learning-rate": number(lambda x: 0 < x <= 1),
    "epochs": number(lambda x: 0 < x <= 1e6),
    "lora-alpha": number(lambda x: 0 < x <= 1e9),
    "lora-dropout": number(lambda x: 0 <= x < 1),
    "batch-size": whole(1),
    "grad-accum": whole(1),
    "max-steps": whole(1, 10**9),
    "warmup-steps": whole(0),
    "eval-every": whole(0),
    "save-every": whole(0),
    "seed": whole(0, 2**63 - 1),
    "max-length": whole(1),
    "lora-r": whole(1, 2**14),
    "template": one_of("qa"),  # the model here has no chat template
}
SWITCHES = [
    "resume",
    "no-sft",
    "no-quantize",
    "gradient-checkpointing",
    "no-gradient-checkpointing",
]
GENERATE = {
    "model": text,
    "adapter": text,
    "prompt": text,
    "device": one_of("cpu"),
    "dtype": one_of("float32", "bfloat16"),
    "template": one_of("qa"),
    "max-new-tokens": whole(1),
    "temperature": number(lambda x: x == 0 or 0.001 <= x <= 1000),
    "top-p": number(lambda x: 0 < x <= 1),
    "seed": whole(0, 2**63 - 1),
}
GOOD = {"device": "cpu", "stage": "sft", "preset": "usual", "loss": "ipo", "target-modules": "all"}
GOOD |= {"dtype": "float32", "template": "qa", "label-smoothing": "0.1"}


def draw(rng, table: dict, given: dict, bad: bool) -> dict:
    """Some flags and their values, about half of the values without sense."""
    for name in rng.sample(list(table), rng.randint(1, 4)):
        good = GOOD.get(name, given.get(name, "1"))
        odd = TEXTS + NUMBERS if rng.random() < 0.3 else NUMBERS
        given[name] = rng.choice(odd) if bad and rng.random() < 0.5 else good
    return given


def parsed(table: dict, given: dict) -> dict:
    """{flag: value}; Refuse if one makes no sense."""
    try:
        return {name: table[name](value) for name, value in given.items()}
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise spec.Refuse(str(error)) from None


def said(main, words):
    """What a function gives back if these are the words of the command line."""
    before, sys.argv = sys.argv, ["command", *words]
    try:
        return main()
    finally:
        sys.argv = before


def checked_run():
    """What train.py's main does before it reads weights and data."""
    run = read_run("")
    config = read_config(run.args.model) if run.args.model else train.TINY_LLAMA
    preflight.check_targets(config, run.args)
    return run


def train_flags(rng, folder, good, bad):
    """train.py's flags and their checks, up to the reading of data and weights."""
    usual = {"model": str(good / "model"), "data": str(good / "rows.jsonl")}
    given = draw(rng, TRAIN, dict(usual, out=str(folder / "out")), bad)
    switches = [name for name in SWITCHES if bad and rng.random() < 0.1]
    for name in ("model", "data"):
        if bad and rng.random() < 0.1:
            given.pop(name)
    words = [w for name, v in given.items() for w in (f"--{name}", v)] + [
        f"--{s}" for s in switches
    ]

    def read():
        def main():
            run = checked_run()
            return {name: getattr(run.args, name.replace("-", "_")) for name in given}

        return said(main, words)

    def expect():
        values = parsed(TRAIN, given)
        has = values.keys() | switches
        spec.need(values.get("model", usual["model"]) == usual["model"])
        spec.need("reuse" not in has, "there is no such run")
        spec.need(not ("data" in has and "model" not in has))
        spec.need(not ("no-sft" in has and ("sft-adapter" in has or values.get("stage") == "sft")))
        spec.need("model" in has or not {"no-sft", "sft-adapter"} & has)
        spec.need("preset" not in has or (values["preset"] == "forum") == ("data" not in has))
        kind, smoothed = values.get("loss", "sigmoid"), values.get("label-smoothing", 0) > 0
        spec.need(kind in ("sigmoid", "robust") or not smoothed)
        spec.need(kind != "robust" or smoothed)
        spec.need(kind == "simpo" or values.get("simpo-gamma", 0.5) == 0.5)
        spec.need(kind != "orpo" or not values.get("nll-weight"))
        first = ["sft", "dpo"] if "no-sft" not in has else ["dpo"]
        first = first[:1] if "model" in has else ["pretrain"]
        spec.need(values.get("stage", first[0]) == first[0], "the stage before is missing")
        return values

    return read, expect


def generate_flags(rng, folder, good, bad):
    """generate's flags and their checks."""
    given = draw(rng, GENERATE, {"model": str(good / "model"), "prompt": "Is it?"}, bad)
    if bad and rng.random() < 0.05:
        given.pop("model", None)
    words = [word for name, value in given.items() for word in (f"--{name}", value)]

    def read():
        args = said(lambda: ask.make_parser().parse_args(), words)
        flags.check_device(args.device)
        return {name: getattr(args, name.replace("-", "_")) for name in given}

    def expect():
        spec.need("model" in given)
        return parsed(GENERATE, given)

    return read, expect


def saved_run(rng, folder, good, bad):
    """--resume: the flags in a run's config.json, as a run of train.py wrote them."""
    path, out = folder / "out" / "config.json", folder / "out"
    shutil.copytree(good / "run", out)
    whole = json.loads(path.read_bytes())
    if bad and rng.random() < 0.8:  # one flag
        saved = dict(whole["arguments"])
        name = rng.choice(list(saved))
        saved[name] = rng.choice([*hostile.VALUES, *NUMBERS])
        changed = whole | {"arguments": saved}
    elif bad:
        changed = hostile.change_json(rng, whole)
    path.write_bytes(hostile.json_bytes(rng, changed) if bad else json.dumps(whole).encode())

    def read():
        run = said(checked_run, ["--resume", "--out", str(out)])
        return {k: v for k, v in vars(run.args).items() if k not in ("out", "resume", "stage")}

    def expect():
        saved = spec.strict_json(path.read_bytes()).get("arguments")
        spec.need(isinstance(saved, dict) and "stage" in saved)
        for name, value in saved.items():
            spec.need(name != "model" or value in (None, whole["arguments"]["model"]))
            check_saved(name.replace("_", "-"), value, whole["arguments"].get(name))
        spec.need(saved.get("data") is None or saved.get("model") is not None)
        gone = dict.fromkeys(("out", "resume", "stage"))
        kept = {k: v for k, v in (whole["arguments"] | saved).items() if k not in gone}
        kept["template"] = kept["template"] or whole["arguments"]["template"]  # found out again
        # A flag that the file no longer says has its usual value again.
        return kept if saved.keys() == whole["arguments"].keys() else EITHER

    return read, expect


def check_saved(flag: str, value, before):
    """Refuse a saved value that is not one of the flag's."""
    if flag in ("template", "template-digest"):  # compared with what the run would take now
        spec.need(value == before or (value is None and flag == "template"))
    elif flag in TRAIN and value is not None:
        right = TRAIN[flag]
        spec.need(type(value) in (int, float, str))
        spec.need(parsed({flag: right}, {flag: str(value)})[flag] == value, flag)
    elif value is None:
        never = {"beta", "max-length", "target-modules", "loss", "seed"}
        never |= {"label-smoothing", "simpo-gamma", "nll-weight"}
        never |= {"lora-r", "lora-alpha", "lora-dropout"}
        spec.need(flag not in never and flag.replace("-", "_") in KNOWN)
    else:
        spec.need(type(value) is bool and flag.replace("-", "_") in KNOWN)


KNOWN = {action.dest for action in make_parser("")._actions} - {"help"}


def make_good(folder):
    """A file of pairs, and a run's folder with the config.json that `--resume` reads."""
    rows = [{"prompt": f"Is it {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", folder / "model", "--data", folder / "rows.jsonl", "--out", folder / "run"]
    run = said(lambda: read_run(""), list(map(str, words)))
    run.out.mkdir()
    record = {"arguments": vars(run.args), "stages": {}, "data": "", "process": {"id": 1}}
    (run.out / "config.json").write_text(json.dumps(record))
