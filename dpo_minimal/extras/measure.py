"""The command line of evaluate.py: a model, with or without an adapter, on any pairs and prompts.

    python -m dpo_minimal.evaluate --model DIR [--adapter DIR] --data PAIRS [--prompts FILE]
    python -m dpo_minimal.evaluate --verify RUN

The reference of the rewards is the model without the adapter. A run's dpo/ holds SFT too, so there
it is the run's sft/. For a model without an adapter it may be another model, see --reference.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from dpo_minimal import InputError
from dpo_minimal.checkpoint import load_adapter, load_llama
from dpo_minimal.data import encode_pairs, load_pairs
from dpo_minimal.evaluate import one_epoch, preference_metrics
from dpo_minimal.extras import losses, passport, report
from dpo_minimal.extras.ask import read_questions
from dpo_minimal.extras.command_line import real, refuse, temperature, whole
from dpo_minimal.extras.flags import check_device
from dpo_minimal.extras.machine import device_and_dtype
from dpo_minimal.extras.preflight import check_fit
from dpo_minimal.extras.reading import read_json
from dpo_minimal.extras.sampling import ready_to_sample
from dpo_minimal.files import whole_file
from dpo_minimal.formats.chat import chosen_template
from dpo_minimal.formats.layout import data_parts
from dpo_minimal.generate import sample_answers
from dpo_minimal.lora import active_adapters
from dpo_minimal.reference import pair_logps
from dpo_minimal.tokenizer import load_tokenizer

DEFAULTS = {**asdict(losses.LossSettings()), "max_length": 1024}
COLUMNS = "| model | chosen likelier | logps/chosen | logps/rejected | accuracy | margin | loss |"


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description="Evaluate a model, or verify a run.")
    parser.error = refuse
    flag = parser.add_argument
    flag("--model", help="model folder; with --verify the run's base, if it has moved")
    flag("--adapter", help="adapter folder, such as runs/forum/dpo")
    flag("--reference", help="adapter folder; without --adapter a model folder")
    flag("--data", help="preference pairs: a file, or a folder, of which the evaluation part")
    flag("--template", choices=("qa", "chat"), help="(the adapter's, else the model's own)")
    flag("--chat-template", metavar="FILE", help="a Jinja template")
    flag("--beta", type=real(above=0), help="of the rewards (0.1, or the run's)")
    flag("--loss", choices=losses.loss_kinds(), help="(sigmoid, or the run's)")
    flag("--label-smoothing", type=real(low=0, below=0.5), help="share of wrong votes")
    flag("--simpo-gamma", type=real(low=0), help="SimPO's margin (0.5, or the run's)")
    flag("--nll-weight", type=real(low=0), help="of the chosen answer's NLL (0, or the run's)")
    flag("--max-length", type=whole(1), help="tokens of prompt + answer (1024, or the run's)")
    flag("--batch-size", type=whole(1), default=4, help="pairs per forward pass")
    flag("--no-quantize", action="store_true", help="even under an adapter")
    flag("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU, else float32")
    flag("--device", help="cuda if there is one, else cpu")
    flag("--prompts", metavar="FILE", help="questions, one per line, to be answered by each model")
    flag("--out", metavar="FILE", help="where the answers go, as Markdown, if not to the screen")
    flag("--max-new-tokens", type=whole(1), default=128)
    flag("--temperature", type=temperature, default=0.0, help="0: greedy")
    flag("--top-p", type=real(above=0, high=1), default=1.0)
    flag("--seed", type=whole(0, 2**63 - 1), default=0)
    flag("--verify", metavar="RUN", help="whether a run's products give the run's own numbers")
    flag("--merged", help="with --verify: a merged folder in place of the run's")
    return parser


def settings_beside(folder) -> dict:
    """The flags of the run whose product a folder is; {} if it is nobody's that we know."""
    path = Path(folder).resolve().parent / "config.json"
    flags = read_json(path).get("arguments") if path.exists() else None
    return flags if isinstance(flags, dict) and "beta" in flags else {}


def fill_in(args):
    """Set the flags that were not given: to those of the run beside, or to the usual ones."""
    saved = settings_beside(args.adapter or args.model)
    if args.loss not in (None, saved.get("loss")):  # another loss: the run's settings are not its
        of_loss = asdict(losses.LossSettings()).keys() - {"beta"}
        saved = {name: value for name, value in saved.items() if name not in of_loss}
    for name, usual in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, saved.get(name, usual))
    if args.adapter and saved.get("no_quantize"):
        args.no_quantize = True
    if saved:
        print(f"settings  of {Path(args.adapter or args.model).resolve().parent}, but for flags")
    if args.adapter and not args.reference:
        args.reference = find_reference(Path(args.adapter))


def find_reference(adapter: Path) -> str | None:
    """The sft/ beside an adapter that contains it, as a run's dpo/ does; else None."""
    beside = adapter.resolve().parent / "sft"
    if beside == adapter.resolve() or not (beside / "adapter_config.json").exists():
        return None
    if not passport.contains(adapter, beside):
        return None
    print(f"reference {beside}, which {adapter} contains")
    return str(beside)


def open_models(args, device, dtype):
    """(model, {label: active adapters}); the last label is what is measured."""
    quantize = "nf4" if args.adapter and not args.no_quantize else None
    model = load_llama(args.model, device, dtype, quantize)
    variants = {"base": []}
    if not args.adapter:
        return model, {Path(args.model).resolve().name: []}
    if args.reference:
        load_adapter(model, args.reference, "reference")
        variants[f"{Path(args.reference).resolve().name} (reference)"] = ["reference"]
    load_adapter(model, args.adapter, "adapter")
    return model, variants | {Path(args.adapter).resolve().name: ["adapter"]}


def measure_pairs(args, model, variants: dict, tokenizer, device, dtype) -> str:
    """A Markdown table of log-probabilities, and of what the last variant is to its reference."""
    part = data_parts(Path(args.data))
    texts = load_pairs(part.get("evaluation", part["train"]))
    pairs = encode_pairs(tokenizer, texts, args.max_length, "pairs")
    batches, logps = one_epoch(pairs, args.batch_size), {}
    for label, names in variants.items():
        print(f"measure   {label} on {len(pairs):,} pairs of {args.data}", flush=True)
        with active_adapters(model, names):
            logps[label] = pair_logps(model, pairs, batches, device)
    last, ref = list(logps)[-1], None
    if args.adapter:
        ref = logps[list(logps)[-2]]  # the reference, or the base
    elif args.reference:
        other = load_llama(args.reference, device, dtype, quantize=None)
        ref = pair_logps(other, pairs, batches, device)
    elif args.loss in losses.REFERENCE_FREE:
        ref = torch.zeros(len(pairs), 2)  # which nothing looks at
    lines = [COLUMNS, "|---" * 7 + "|"]
    for label, policy in logps.items():
        chosen, rejected = policy.T
        numbers = f"{(chosen > rejected).float().mean():.3f} | {chosen.mean():.3f}"
        rest = "- | - | -"
        if label == last and ref is not None:
            rest = rewards_of(args, policy, ref, losses.pair_lengths(pairs))
        lines.append(f"| {label} | {numbers} | {rejected.mean():.3f} | {rest} |")
    return "\n".join([*lines, f"\n{len(pairs):,} pairs of {args.data}, beta {args.beta:g}"])


def rewards_of(args, policy, ref, lengths) -> str:
    """Three cells: accuracy, margin and loss of a policy against its reference."""
    metrics = preference_metrics(policy, ref, lengths, losses.loss_settings(vars(args)))
    accuracy, margin = metrics["rewards/accuracies"], metrics["rewards/margins"]
    return f"{accuracy:.3f} | {margin:+.4f} | {metrics['loss']:.4f}"


def answer_prompts(args, model, variants: dict, tokenizer) -> str:
    """Every variant's answer to each line of a file, as Markdown."""
    questions, answers = read_questions(args.prompts), {}
    sampling = dict(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    with ready_to_sample(model):  # once for all variants
        for label, names in variants.items():
            print(f"answer    {label}, {len(questions)} questions", flush=True)
            with active_adapters(model, names):
                ids = sample_answers(model, tokenizer, questions, args.max_new_tokens, **sampling)
            answers[label] = [tokenizer.decode(answer).strip() for answer in ids]
    return report.format_samples(questions, answers)


def main():
    """The command line."""
    args = make_parser().parse_args()
    check_device(args.device)
    device, dtype = device_and_dtype(args.device, args.dtype)
    if args.verify:
        passport.verify(args, device)
        return
    if not args.model or not (args.data or args.prompts):
        raise InputError("give --model and --data or --prompts, or --verify RUN")
    fill_in(args)
    losses.check_loss(losses.loss_settings(vars(args)))
    tokenizer = load_tokenizer(args.model, chosen_template(args, args.adapter, args.model))
    model, variants = open_models(args, device, dtype)
    check_fit(args.model, tokenizer, model.config, 0)
    if args.data:
        print(f"\n{measure_pairs(args, model, variants, tokenizer, device, dtype)}\n")
    if args.prompts:
        text = answer_prompts(args, model, variants, tokenizer)
        if not args.out:
            print(f"\n{text}")
            return
        with whole_file(args.out) as file:
            file.write(text.encode())
        print(f"answers   {args.out}")
