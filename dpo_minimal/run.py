"""A run: its flags, its settings, its folder, and which stages are still to be done."""

import argparse
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dpo_minimal import InputError
from dpo_minimal.extras import digest, lock, parallel, reuse, trackers
from dpo_minimal.extras.compiled import check_compiler
from dpo_minimal.extras.flags import check_flags, check_saved, make_parser, with_defaults
from dpo_minimal.extras.machine import device_and_dtype
from dpo_minimal.extras.presets import STAGE_FLAGS, preset_of, stage_settings
from dpo_minimal.extras.reading import read_json
from dpo_minimal.files import write_json
from dpo_minimal.formats.chat import chosen_template, settle_template, write_template
from dpo_minimal.loop import Settings

# In order: each stage and the folder that it leaves behind.
PRODUCTS = {"pretrain": "base", "sft": "sft", "dpo": "dpo", "evaluate": "merged"}

# With more pairs than this, skip the evaluation before step 0: a thousand pairs are held out then,
# so it takes minutes, and its result is known.
MANY = 50_000


def saved_flags(folder: Path, resume: bool, stage: str | None) -> dict:
    """The flags of an earlier command on this folder that hold on unless a flag says otherwise."""
    if not (folder / "config.json").exists():
        return {}
    saved = read_json(folder / "config.json").get("arguments")
    if not isinstance(saved, dict) or "stage" not in saved:
        raise InputError(f"{folder / 'config.json'} is not that of a run: see --out and --reuse")
    check_saved(saved, folder / "config.json")
    left_out = {"stage", "resume", "out", "track"}
    if not resume and saved["stage"] not in (None, stage):
        left_out |= STAGE_FLAGS
    return {name: value for name, value in with_defaults(saved).items() if name not in left_out}


def stages_of(args) -> list[str]:
    """The stages of a run, whether done or not."""
    left_out = {"pretrain": args.model, "sft": args.no_sft}
    return [stage for stage in PRODUCTS if not left_out.get(stage)]


def check_folder(out: Path, args):
    """InputError if the run would overwrite another one, or lacks an earlier stage's product."""
    stages = stages_of(args)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give --out another name")
    filled = out.exists() and any(out.iterdir())
    if filled and not args.resume and args.stage in (None, stages[0]):
        raise InputError(f"{out} is not empty: go on with --resume, or give --out another folder")
    if args.stage is None:
        return
    for stage in stages[: stages.index(args.stage)]:
        if not (out / PRODUCTS[stage]).exists() and not args.reuse:
            first = f"run --stage {stage} first (or give --model, or --reuse a run)"
            raise InputError(f"{out} has no {PRODUCTS[stage]}/ yet: {first}")
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
    def template(self) -> str | None:
        """The chat template that everything here is in; None for the blog's text."""
        return chosen_template(self.args, self.args.sft_adapter, self.model_folder)

    def describe(self, folder, card=""):
        """Put beside a product how it wants to be asked, and its model card once there is one."""
        write_template(folder, self.template)
        if card:
            (Path(folder) / "README.md").write_text(card, "utf-8")

    @property
    def about(self) -> tuple:
        """What an adapter's folder says beside its weights, for `save_adapter`."""
        return str(self.model_folder), self.describe

    @property
    def scratch(self) -> Path:
        """An existing folder on the run's disk: the system's /tmp may be in memory."""
        return next(path for path in (self.out, *self.out.absolute().parents) if path.is_dir())

    def is_due(self, stage: str) -> bool:
        """Whether to run a stage: a part of this run, asked for, not done yet."""
        if stage not in stages_of(self.args):
            return False
        return self.args.stage in (None, stage) and not (self.out / PRODUCTS[stage]).exists()

    def settings_for(self, stage: str, num_rows: int) -> Settings:
        """A stage's settings, given how many rows or pairs an epoch has.

        Unless flags say otherwise, steps are so small that an epoch has at least 32.
        """
        settings = replace(self.settings[stage], eval_at_start=num_rows < MANY)
        if self.args.batch_size or self.args.grad_accum or self.args.preset:
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
        """Make the folder, lock it, and write config.json; no process goes on before that."""
        if parallel.first():
            self.make_folder()
        parallel.wait()

    def make_folder(self):
        """In process 0: the folder with its lock, and config.json: all settings and versions."""
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
        if self.args.reuse:
            reuse.begin(self.out, Path(self.args.reuse), data)
        trackers.start(self.args.track, self.out, record)


def read_run(description: str) -> Run:
    """The run that the command line asks for. InputError if its folder does not allow it."""
    parser = make_parser(description)
    args = parser.parse_args()
    default_out = Path("runs") / (Path(args.model).resolve().name if args.model else "forum")
    out = Path(args.out or default_out)
    saved = saved_flags(out, args.resume, args.stage) if args.resume or args.stage else {}
    fixed = saved if args.resume else ()
    if args.reuse and not saved:
        saved, fixed = saved_flags(Path(args.reuse), True, None), reuse.FIXED
        if not saved:
            raise InputError(f"--reuse {args.reuse}: there is no run with a config.json")
    parser.set_defaults(**(preset_of(args)[0] | saved))
    args = parser.parse_args()
    changed = [name for name in fixed if saved.get(name) != getattr(args, name, None)]
    if changed:
        flag = changed[0].replace("_", "-")
        how = f"--resume {out}" if args.resume else f"--reuse {args.reuse}"
        raise InputError(f"{how}: --{flag} was {saved.get(changed[0])} there, and cannot change")
    check_flags(args)
    check_folder(out, args)
    settle_template(args)
    trackers.check_installed(args.track)
    device, dtype = device_and_dtype(args.device, args.dtype)
    # After the checks, or the other processes would take what the first one writes for an old run.
    device = parallel.start(device)
    if args.compile and args.stage != "evaluate":  # which trains nothing
        check_compiler(device)
    return Run(args, out, device, dtype, stage_settings(args))
