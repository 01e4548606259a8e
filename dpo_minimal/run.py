"""A run: its flags, its settings, its folder, and which stages are still to be done."""

import argparse
import os
import platform
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from dpo_minimal import InputError
from dpo_minimal.extras import digest, lock, parallel
from dpo_minimal.extras.command_line import real, refuse, whole
from dpo_minimal.extras.compiled import check_compiler
from dpo_minimal.files import read_json, write_json
from dpo_minimal.loop import Settings
from dpo_minimal.loss import LOSSES

# In order: each stage and the folder that it leaves behind.
PRODUCTS = {"pretrain": "base", "sft": "sft", "dpo": "dpo", "evaluate": "merged"}

# The forum's own settings. There an answer is one of 15, which is some 2.7 nats of choice, and the
# implicit reward at the optimum is the true score. So beta is 1: beta 0.1 would ask for log-ratios
# ten times as large.
FORUM_FLAGS = dict(beta=1.0, max_length=128, target_modules="all", gradient_checkpointing=False)
FORUM = {
    "pretrain": Settings(learning_rate=2e-3, batch_size=8, weight_decay=0.0, save_every=200),
    "sft": Settings(learning_rate=2e-3, batch_size=8, epochs=3, save_every=100),
    "dpo": Settings(learning_rate=1.5e-3, batch_size=32, epochs=2, eval_every=100, save_every=50),
}
# The blog's settings for Llama 2 7B and stack-exchange-paired, except that SFT's learning rate was
# 1e-4 there. It had 500 steps of 8 rows; smaller data need larger steps.
BLOG_FLAGS = dict(
    beta=0.1, max_length=1024, target_modules="q_proj,v_proj", gradient_checkpointing=True
)
BLOG = {
    "sft": Settings(learning_rate=5e-4, batch_size=4, grad_accum=2, save_every=100),
    "dpo": Settings(learning_rate=5e-4, batch_size=4, grad_accum=4, eval_every=100, save_every=100),
}
# With more pairs than this, skip the evaluation before step 0: a thousand pairs are held out then,
# so it takes minutes, and its result is known.
MANY = 50_000
# Flags that say how a stage trains. Unlike the others, they mean nothing to another stage.
STAGE_FLAGS = {field.name for field in fields(Settings)}


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags, by their names in the field."""
    lines_kept, on_off = argparse.RawTextHelpFormatter, argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=description, formatter_class=lines_kept)
    parser.error = refuse
    files = parser.add_argument_group("files").add_argument
    files("--model", help="model folder; without it a tiny Llama is pretrained")
    files("--data", help="preference file or folder; without it the embedded forum")
    files("--eval-data", help="held-out pairs; without it a part of the data")
    files("--out", help="run folder (runs/forum, or runs/ and the model's name)")
    files("--stage", choices=PRODUCTS, help="run only this stage")
    files("--resume", action="store_true", help="go on with an interrupted run")
    kinds = [f"{kind}: {(loss.__doc__ or '?').splitlines()[0]}" for kind, loss in LOSSES.items()]
    losses = "\n".join(kinds).replace("%", "%%")  # argparse would fill in something after a %
    dpo = parser.add_argument_group("DPO").add_argument
    dpo("--beta", type=real(above=0), help="pull towards the reference (0.1; forum 1)")
    dpo("--loss", choices=LOSSES, default="sigmoid", help=losses)
    smoothing = real(low=0, below=0.5)
    dpo("--label-smoothing", type=smoothing, default=0.0, help="cDPO: the share of wrong votes")
    training = parser.add_argument_group("training; defaults differ by stage").add_argument
    training("--learning-rate", type=real(above=0, high=1))
    training("--batch-size", type=whole(1), help="pairs, or packed rows, per forward pass")
    training("--grad-accum", type=whole(1), help="forward passes per step")
    training("--epochs", type=real(above=0, high=1e6))
    training("--max-steps", type=whole(1, 10**9), help="most steps of each stage")
    training("--warmup-steps", type=whole(0), help="by default a tenth of the steps")
    training("--eval-every", type=whole(0), help="steps between evaluations; 0: only at the end")
    training("--save-every", type=whole(0), help="steps between saved states; 0: never")
    training("--seed", type=whole(0, 2**63 - 1), default=0)
    model = parser.add_argument_group("model").add_argument
    model("--max-length", type=whole(1), help="tokens of prompt + answer (1024; forum 128)")
    model("--lora-r", type=whole(1, 2**14), default=8)
    model("--lora-alpha", type=real(above=0), default=16)
    model("--lora-dropout", type=real(low=0, below=1), default=0.05)
    model("--target-modules", help="linear layers, or all (q_proj,v_proj; forum all)")
    model("--no-quantize", action="store_true", help="LoRA instead of QLoRA")
    model("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU, else float32")
    model("--device", help="cuda if there is one, else cpu")
    model("--gradient-checkpointing", action=on_off, help="less memory, more time (on; forum off)")
    model("--compile", action="store_true", help="torch.compile each block")
    return parser


def saved_flags(out: Path, resume: bool, stage: str | None) -> dict:
    """The flags of an earlier command on this folder that hold on unless a flag says otherwise."""
    if not (resume or stage) or not (out / "config.json").exists():
        return {}
    saved = read_json(out / "config.json").get("arguments")
    if not isinstance(saved, dict) or "stage" not in saved:
        raise InputError(f"{out / 'config.json'} is not that of a run: give --out another folder")
    left_out = {"stage", "resume", "out"}
    if not resume and saved["stage"] not in (None, stage):
        left_out |= STAGE_FLAGS
    return {name: value for name, value in saved.items() if name not in left_out}


def check_flags(args):
    """InputError for flags that make no sense, alone or together."""
    if args.data and not args.model:
        raise InputError("--data needs --model: the tiny Llama made here knows only the forum")
    if args.stage == "pretrain" and args.model:
        raise InputError("--stage pretrain makes the forum's own model: leave out --model")
    if args.label_smoothing and args.loss != "sigmoid":
        raise InputError(f"--label-smoothing goes with --loss sigmoid, not {args.loss}")
    kind, _, number = (args.device or "cpu").partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise InputError(f"--device {args.device}: give cpu, cuda, or cuda: and a GPU's number")
    if kind == "cuda" and not int(number or 0) < torch.cuda.device_count():
        raise InputError(f"--device {args.device}: torch finds no such GPU here")


def check_folder(out: Path, args):
    """InputError if the run would overwrite another one, or lacks an earlier stage's product."""
    stages = list(PRODUCTS)
    if args.model:
        stages.remove("pretrain")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give --out another name")
    filled = out.exists() and any(out.iterdir())
    if filled and not args.resume and args.stage in (None, stages[0]):
        raise InputError(f"{out} is not empty: go on with --resume, or give --out another folder")
    if args.stage is None:
        return
    for stage in stages[: stages.index(args.stage)]:
        if not (out / PRODUCTS[stage]).exists():
            raise InputError(f"{out} has no {PRODUCTS[stage]}/ yet: run --stage {stage} first")
    if (out / PRODUCTS[args.stage]).exists() and not args.resume:
        raise InputError(f"{out / PRODUCTS[args.stage]} is there already: give --out a new folder")


@dataclass(frozen=True)
class Run:
    """What every stage needs: the flags, the folder, and each stage's settings."""

    args: argparse.Namespace
    out: Path
    device: str
    dtype: torch.dtype
    settings: dict[str, Settings]

    @property
    def on_forum(self) -> bool:
        """Whether the data are the embedded forum's, where a judge knows the truth."""
        return self.args.data is None

    @property
    def model_folder(self) -> Path:
        """The base model."""
        return Path(self.args.model or self.out / "base")

    @property
    def scratch(self) -> Path:
        """An existing folder on the run's disk: the system's /tmp may be in memory."""
        return next(path for path in (self.out, *self.out.absolute().parents) if path.is_dir())

    def is_due(self, stage: str) -> bool:
        """Whether to run a stage: asked for, not done yet, not replaced by --model."""
        if stage == "pretrain" and self.args.model:
            return False
        return self.args.stage in (None, stage) and not (self.out / PRODUCTS[stage]).exists()

    def settings_for(self, stage: str, num_rows: int) -> Settings:
        """A stage's settings, given how many rows or pairs an epoch has.

        Unless flags say otherwise, steps are so small that an epoch has at least 32.
        """
        settings = replace(self.settings[stage], eval_at_start=num_rows < MANY)
        if self.args.batch_size or self.args.grad_accum:
            return settings
        batch_size = min(settings.batch_size, max(1, num_rows // 32))
        grad_accum = min(settings.grad_accum, max(1, num_rows // (32 * batch_size)))
        return replace(settings, batch_size=batch_size, grad_accum=grad_accum)

    def finish(self, stage: str, save):
        """Save a stage's product; only then may its state go, and other processes go on."""
        if parallel.first():
            save()
            (self.out / "state" / f"{stage}.pt").unlink(missing_ok=True)
        parallel.wait()

    def start(self):
        """Make the folder, lock it, and write config.json: all settings and versions."""
        if not parallel.first():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        lock.hold(self.out.absolute())
        check_folder(self.out, self.args)  # another run may have come and gone since the first time
        (self.out / "state").mkdir(exist_ok=True)
        for stage, product in PRODUCTS.items():
            if (self.out / product).exists():  # a kill may have come between the two
                (self.out / "state" / f"{stage}.pt").unlink(missing_ok=True)
        data = digest.of_files(self.args.data, self.args.eval_data)
        path = self.out / "config.json"
        earlier = read_json(path) if self.args.resume and path.exists() else {}
        if earlier.get("data", data) != data:
            raise InputError(f"{self.out}: the data changed since this run began; see --data")
        on_gpu = self.device.startswith("cuda")
        record = {
            "arguments": vars(self.args),
            "stages": {stage: asdict(settings) for stage, settings in self.settings.items()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "dtype": str(self.dtype),
            "data": data,
            "process": {"id": os.getpid(), "host": platform.node()},
        }
        write_json(path, record)


def read_run(description: str) -> Run:
    """The run that the command line asks for. InputError if its folder does not allow it."""
    parser = make_parser(description)
    args = parser.parse_args()
    default_out = Path("runs") / (Path(args.model).resolve().name if args.model else "forum")
    out = Path(args.out or default_out)
    saved = saved_flags(out, args.resume, args.stage)
    parser.set_defaults(**(saved or (BLOG_FLAGS if args.data else FORUM_FLAGS)))
    args = parser.parse_args()
    changed = [name for name in saved if saved[name] != getattr(args, name)]
    if args.resume and changed:
        flag = changed[0].replace("_", "-")
        raise InputError(f"{out}: --{flag} was {saved[changed[0]]} here: resume without changes")
    check_flags(args)
    check_folder(out, args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    # After the checks, or the other processes would take what the first one writes for an old run.
    device = parallel.start(device)
    if args.compile and args.stage != "evaluate":  # which trains nothing
        check_compiler(device)
    return Run(args, out, device, getattr(torch, dtype), stage_settings(args))


def stage_settings(args) -> dict[str, Settings]:
    """Each stage's preset, with the flags that were given in place of its own values."""
    given = {name: getattr(args, name, None) for name in STAGE_FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    presets = BLOG if args.data else FORUM
    return {stage: replace(preset, **given) for stage, preset in presets.items()}
