"""The flags of train.py, and which of them make sense together."""

import argparse

import torch

from dpo_minimal import InputError
from dpo_minimal.extras.command_line import real, refuse, whole, words
from dpo_minimal.extras.losses import LossSettings, check_loss, loss_kinds, loss_settings
from dpo_minimal.extras.presets import PRESETS
from dpo_minimal.extras.trackers import TRACKERS

STAGES = ("pretrain", "sft", "dpo", "evaluate")


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags of train.py, by their names in the field."""
    lines_kept, on_off = argparse.RawTextHelpFormatter, argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=description, formatter_class=lines_kept)
    parser.error = refuse
    files = parser.add_argument_group("files").add_argument
    files("--model", type=words, help="model folder; without it a tiny Llama is pretrained")
    files("--data", type=words, help="preference file or folder; without it the embedded forum")
    files("--eval-data", type=words, help="held-out pairs; without it a part of the data")
    files("--out", type=words, help="run folder (runs/forum, or runs/ and the model's name)")
    files("--stage", choices=STAGES, help="run only this stage")
    files("--resume", action="store_true", help="go on with an interrupted run")
    files("--reuse", type=words, metavar="RUN", help="begin with that run's base, SFT, reference")
    files("--no-sft", action="store_true", help="DPO on the model as it is, its own reference")
    files("--sft-adapter", type=words, metavar="DIR", help="a PEFT adapter, instead of SFT")
    templates = "the blog's text, or the model's own (default for rows of messages)"
    files("--template", choices=("qa", "chat"), help=templates)
    files("--chat-template", type=words, metavar="FILE", help="Jinja, for a model without one")
    files("--track", choices=TRACKERS, help="show the metrics there as they come")
    files("--preset", choices=PRESETS, help="settings by name; stack-llama-2: the blog's own")
    kinds = loss_kinds()
    losses = "\n".join(f"{kind}: {line}" for kind, line in kinds.items())
    losses = losses.replace("%", "%%")  # argparse would fill in something after a %
    dpo = parser.add_argument_group("DPO").add_argument
    dpo("--beta", type=real(above=0), help="pull towards the reference (0.1; forum 1)")
    dpo("--loss", choices=kinds, default="sigmoid", help=losses)
    smoothing = real(low=0, below=0.5)
    dpo("--label-smoothing", type=smoothing, default=0.0, help="cDPO, robust: share of wrong votes")
    gamma = LossSettings.simpo_gamma
    dpo("--simpo-gamma", type=real(low=0), default=gamma, help=f"SimPO's margin ({gamma})")
    dpo("--nll-weight", type=real(low=0), default=0.0, help="RPO: of the chosen answer's NLL (0)")
    training = parser.add_argument_group("training; defaults differ by stage").add_argument
    training("--learning-rate", type=real(above=0, high=1), help="at the end of the warmup")
    training("--batch-size", type=whole(1), help="pairs, or packed rows, per forward pass")
    training("--grad-accum", type=whole(1), help="forward passes per step")
    training("--epochs", type=real(above=0, high=1e6), help="how often the data are seen")
    training("--max-steps", type=whole(1, 10**9), help="most steps of each stage")
    training("--warmup-steps", type=whole(0), help="by default a tenth of the steps")
    training("--eval-every", type=whole(0), help="steps between evaluations; 0: only at the end")
    limit = "end DPO at an evaluation that finds a KL above this (nats per answer)"
    training("--stop-when", type=real(above=0), metavar="KL", help=limit)
    training("--save-every", type=whole(0), help="steps between saved states; 0: never")
    training("--seed", type=whole(0, 2**63 - 1), default=0, help="of all that is random (0)")
    model = parser.add_argument_group("model").add_argument
    model("--max-length", type=whole(1), help="tokens of prompt + answer (1024; forum 128)")
    model("--lora-r", type=whole(1, 2**14), default=8, help="rank of the adapters (8)")
    model("--lora-alpha", type=real(above=0), default=16, help="their scale is alpha / r (16)")
    model("--lora-dropout", type=real(low=0, below=1), default=0.05, help="in training (0.05)")
    model("--target-modules", type=words, help="linear layers, or all (q_proj,v_proj; forum all)")
    model("--no-quantize", action="store_true", help="LoRA instead of QLoRA")
    model("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU, else float32")
    model("--device", help="cuda if there is one, else cpu")
    recompute = "less memory, more time (on; on a GPU if memory asks for it; forum off)"
    model("--gradient-checkpointing", action=on_off, help=recompute)
    model("--compile", action="store_true", help="torch.compile each block")
    return parser


def check_flags(args):
    """InputError for flags that make no sense, alone or together."""
    if args.data and not args.model:
        raise InputError("--data needs --model: the tiny Llama made here knows only the forum")
    if args.eval_data and not args.data:
        raise InputError("--eval-data goes with --data: the forum has its own evaluation part")
    if args.stage == "pretrain" and args.model:
        raise InputError("--stage pretrain makes the forum's own model: leave out --model")
    if (args.no_sft or args.sft_adapter) and not args.model:
        raise InputError("--no-sft and --sft-adapter go with --model: the forum has its own SFT")
    if args.no_sft and (args.sft_adapter or args.stage == "sft"):
        raise InputError("--no-sft leaves out SFT: leave out --sft-adapter and --stage sft")
    if args.preset and (args.preset == "forum") != (args.data is None):
        raise InputError(f"--preset {args.preset}: forum goes without --data, the others with it")
    check_template(args)
    if (args.chat_template or args.template == "chat") and not args.data:
        raise InputError("--template chat goes with --model and --data: the forum is no chat")
    check_loss(loss_settings(vars(args)))
    if args.stop_when is not None and args.eval_every == 0:
        raise InputError("--stop-when looks at the evaluations: leave out --eval-every 0")
    check_device(args.device)


def check_template(args):
    """InputError for a chat template together with the blog's text."""
    if args.chat_template and args.template == "qa":
        raise InputError("--chat-template goes with --template chat, not qa")


def check_saved(saved: dict, path):
    """InputError for a flag in a run's config.json that the command line would not have taken."""
    actions = {action.dest: action for action in make_parser("")._actions}
    for name, value in saved.items():
        if name == "template_digest":  # no flag, but kept among them to be compared
            right = isinstance(value, str)
        else:
            right = name in actions and would_take(actions[name], value)
        if not right:
            raise InputError(f"{path}: {name} is {value!r}, which is no value of that flag")


def with_defaults(saved: dict) -> dict:
    """A run's flags, and what those that its version did not have yet stood for then."""
    switches = (action for action in make_parser("")._actions if action.const is True)
    return {action.dest: False for action in switches} | {"template": "qa"} | saved


def would_take(action: argparse.Action, value) -> bool:
    """Whether the command line could have given a flag this value."""
    if value is None:
        return action.default is None and action.dest not in PRESETS["usual"][0]
    if action.nargs == 0:  # a switch
        return isinstance(value, bool)
    try:
        right = (action.type or str)(str(value)) == value
    except argparse.ArgumentTypeError:
        return False
    return right and (action.choices is None or value in action.choices)


def check_device(name: str | None):
    """InputError for a device that torch does not have here."""
    kind, colon, number = (name or "cpu").partition(":")
    numbered = kind == "cuda" and number.isascii() and number.isdecimal()
    if kind not in ("cpu", "cuda", "mps") or (colon and not numbered):
        raise InputError(f"--device {name}: give cpu, cuda, mps, or cuda: and a GPU's number")
    found = kind != "cuda" or int(number or 0) < torch.cuda.device_count()
    if not found or (kind == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"--device {name}: torch finds no such GPU here")
