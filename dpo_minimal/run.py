"""A run: its flags, its settings, its folder, and which stages are still to be done."""

import argparse
import platform
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from dpo_minimal import InputError, parallel
from dpo_minimal.files import read_json, write_json
from dpo_minimal.loop import Log, Settings, count_steps, steps_per_epoch, train

# In order: each stage and the folder that it leaves behind.
PRODUCTS = {"pretrain": "base", "sft": "sft", "dpo": "dpo", "evaluate": "merged"}

# The forum's own settings. There an answer is one of 15, some 2.7 nats of choice, and the implicit
# reward at the optimum is the true score: beta 0.1 would ask for log-ratios ten times as large.
FORUM_FLAGS = {
    **{"beta": 1.0, "max_length": 128, "target_modules": "all"},
    "gradient_checkpointing": False,
}
FORUM = {
    "pretrain": Settings(learning_rate=2e-3, batch_size=8, weight_decay=0.0, save_every=200),
    "sft": Settings(learning_rate=2e-3, batch_size=8, epochs=3, save_every=100),
    "dpo": Settings(learning_rate=1.5e-3, batch_size=32, epochs=2, eval_every=100, save_every=50),
}
MANY = 50_000  # examples: one has a thousand pairs held out, and seeing them takes minutes
# Flags that one stage trains with: unlike the others, they mean nothing to another stage.
STAGE_FLAGS = {field.name for field in fields(Settings)} - {"seed"}
# Those of the blog's run on Llama 2 7B and stack-exchange-paired, but for SFT's learning rate, 1e-4
# there: fewer data than its 500 steps of 8 rows want more.
BLOG_FLAGS = {
    **{"beta": 0.1, "max_length": 1024, "target_modules": "q_proj,v_proj"},
    "gradient_checkpointing": True,
}
BLOG = {
    "sft": Settings(learning_rate=5e-4, batch_size=4, grad_accum=2, save_every=100),
    "dpo": Settings(learning_rate=5e-4, batch_size=4, grad_accum=4, eval_every=100, save_every=100),
}


def positive(text: str) -> int:
    """A flag's whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags, by their names in the field."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    add = parser.add_argument_group("files").add_argument
    add("--model", help="model folder; without it a tiny Llama is pretrained")
    add("--data", help="preference file or folder; without it the embedded forum")
    add("--eval-data", help="held-out pairs; else a part of the data")
    add("--out", help="run folder (runs/forum, or runs/ and the model's name)")
    add("--stage", choices=PRODUCTS, help="only this stage")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add = parser.add_argument_group("DPO").add_argument
    add("--beta", type=float, help="pull towards the reference (0.1; forum 1)")
    add("--loss", choices=["sigmoid", "ipo", "hinge"], default="sigmoid")
    add("--label-smoothing", type=float, default=0.0, help="cDPO: the share of wrong votes")
    add = parser.add_argument_group("training, by default as each stage needs").add_argument
    add("--learning-rate", type=float)
    add("--batch-size", type=positive, help="pairs, or packed rows, a forward pass")
    add("--grad-accum", type=positive, help="forward passes a step")
    add("--epochs", type=float)
    add("--max-steps", type=positive, help="cap of each stage")
    add("--warmup-steps", type=int, help="a tenth of the steps")
    add("--eval-every", type=int, help="steps between evaluations; 0: only at the end")
    add("--save-every", type=int, help="steps between saved states; 0: never")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("model").add_argument
    add("--max-length", type=positive, help="tokens of prompt + answer (1024; forum 128)")
    add("--lora-r", type=positive, default=8)
    add("--lora-alpha", type=float, default=16)
    add("--lora-dropout", type=float, default=0.05)
    add("--target-modules", help="linear layers, or all (q_proj,v_proj; forum all)")
    add("--no-quantize", action="store_true", help="LoRA instead of QLoRA")
    add("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU, else float32")
    add("--device", help="cuda if there is one, else cpu")
    on_off = argparse.BooleanOptionalAction
    add("--gradient-checkpointing", action=on_off, help="less memory, more time (on; forum off)")
    add("--compile", action="store_true", help="torch.compile each block")
    return parser


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
        """A folder that is there already, on the run's disk: the system's /tmp may be memory."""
        return next(path for path in (self.out, *self.out.absolute().parents) if path.is_dir())

    def due(self, stage: str) -> bool:
        """Whether a stage is to be run: asked for, not done yet, not replaced by --model."""
        wanted = self.args.stage in (None, stage) and not (stage == "pretrain" and self.args.model)
        return wanted and not (self.out / PRODUCTS[stage]).exists()

    def fitted(self, stage: str, num_examples: int) -> Settings:
        """A stage's settings; without flags, steps so small that an epoch has at least 32.

        With many examples the first step does not wait for an evaluation of what is known anyway.
        """
        settings = replace(self.settings[stage], eval_at_start=num_examples < MANY)
        if self.args.batch_size or self.args.grad_accum:
            return settings
        batch_size = min(settings.batch_size, max(1, num_examples // 32))
        grad_accum = min(settings.grad_accum, max(1, num_examples // (32 * batch_size)))
        return replace(settings, batch_size=batch_size, grad_accum=grad_accum)

    def train(self, stage, model, objective, batches, collate, evaluate=None, keep=None):
        """The loop with this stage's settings, log and state. batches: a `Batches`."""
        settings = self.fitted(stage, batches.num_rows())
        batches.batch_size = settings.batch_size
        steps = count_steps(settings, batches.num_batches())
        model.gradient_checkpointing = self.args.gradient_checkpointing
        if self.args.compile:
            for block in model.model.layers:
                block.compile()
        epoch = steps_per_epoch(settings, batches.num_batches())
        log = Log(self.out / "metrics.jsonl", stage, steps, epoch)
        state = self.state_path(stage)
        if not self.args.resume and parallel.first():
            state.unlink(missing_ok=True)
        parallel.wait()
        train(model, objective, batches, collate, steps, settings, log, state, evaluate, keep)

    def state_path(self, stage: str) -> Path:
        """Where an interrupted stage is kept; it goes when the stage's product is there."""
        return self.out / "state" / f"{stage}.pt"

    def finish(self, stage: str, save):
        """Save a stage's product; only then its state may go, and other processes may go on."""
        if parallel.first():
            save()
            self.state_path(stage).unlink(missing_ok=True)
        parallel.wait()

    def start(self):
        """Make the folder and write config.json: all settings and versions."""
        if not parallel.first():
            return
        (self.out / "state").mkdir(parents=True, exist_ok=True)
        on_gpu = self.device.startswith("cuda")
        record = {
            "arguments": vars(self.args),
            "stages": {stage: asdict(settings) for stage, settings in self.settings.items()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "dtype": str(self.dtype),
        }
        write_json(self.out / "config.json", record)


def read_run(description: str) -> Run:
    """The run that the command line asks for. InputError if its folder does not allow it."""
    parser = make_parser(description)
    args = parser.parse_args()
    out = Path(args.out or Path("runs") / (Path(args.model).name if args.model else "forum"))
    defaults = BLOG_FLAGS if args.data else FORUM_FLAGS
    saved = {}
    if (args.resume or args.stage) and (out / "config.json").exists():
        # An earlier command's settings hold on, unless a flag says otherwise.
        saved = read_json(out / "config.json")["arguments"]
        left_out = {"stage", "resume", "out"}
        if not args.resume and saved["stage"] not in (None, args.stage):
            left_out |= STAGE_FLAGS
        saved = {name: value for name, value in saved.items() if name not in left_out}
        defaults = saved
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    changed = [name for name in saved if saved[name] != getattr(args, name)]
    if args.resume and changed:
        flag = changed[0].replace("_", "-")
        raise InputError(f"{out}: --{flag} was {saved[changed[0]]} here: resume without changes")
    check_flags(args)
    check_folder(out, args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    given = {field.name: getattr(args, field.name, None) for field in fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    stages = BLOG if args.data else FORUM
    settings = {stage: replace(preset, **given) for stage, preset in stages.items()}
    # After the checks: the other processes would take what the first one writes for another run.
    device = parallel.start(device)
    if args.compile and args.stage != "evaluate":  # which trains nothing
        check_compiler(device)
    return Run(args, out, device, getattr(torch, dtype), settings)


def check_flags(args):
    """InputError for flags that make no sense, alone or together."""
    if args.data and not args.model:
        raise InputError("--data needs --model: the tiny Llama made here knows the forum only")
    if args.stage == "pretrain" and args.model:
        raise InputError("--stage pretrain makes the forum's own model: leave out --model")
    if args.label_smoothing and args.loss != "sigmoid":
        raise InputError(f"--label-smoothing goes with --loss sigmoid, not {args.loss}")
    if not 0 <= args.label_smoothing < 0.5 or args.beta <= 0:
        raise InputError("--label-smoothing must be in [0, 0.5), --beta above 0")
    if (args.device or "").startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: torch finds no GPU here")


def check_compiler(device: str):
    """InputError if torch.compile does not work here: it asks for a C++ compiler, or for Triton."""
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise InputError(f"--compile: torch cannot compile here, leave it out ({reason})") from None


def check_folder(out: Path, args):
    """InputError if the run would overwrite another one, or lacks an earlier stage's product."""
    stages = list(PRODUCTS)[bool(args.model) :]
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
