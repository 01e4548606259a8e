"""The command line of generate.py: ask a model a question, or converse with it.

    python -m dpo_minimal.generate --model DIR [--adapter DIR] --prompt TEXT

Without --prompt it converses: each line is a new question.
"""

import argparse

import torch

from dpo_minimal import InputError
from dpo_minimal.checkpoint import load_adapter, load_llama
from dpo_minimal.data import format_prompt
from dpo_minimal.extras.command_line import real, refuse, whole, words
from dpo_minimal.extras.flags import check_device
from dpo_minimal.extras.preflight import check_fit
from dpo_minimal.generate import generate
from dpo_minimal.tokenizer import load_tokenizer


def temperature(text: str) -> float:
    """An argparse type: 0, or so large that a logit divided by it is finite."""
    value = real(low=0, high=1e3)(text)
    if 0 < value < 1e-3:
        raise argparse.ArgumentTypeError(f"{text[:40]} is above 0 and below 0.001")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description="Ask a model.")
    parser.error = refuse
    parser.add_argument(
        "--model", type=words, required=True, help="model folder, Hugging Face or Meta layout"
    )
    parser.add_argument("--adapter", type=words, help="adapter folder, such as runs/forum/dpo")
    parser.add_argument(
        "--prompt", type=words, help="the question; without it, read questions line by line"
    )
    parser.add_argument("--max-new-tokens", type=whole(1), default=128)
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=real(above=0, high=1), default=1.0)
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0)
    parser.add_argument("--no-quantize", action="store_true", help="even under an adapter")
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    return parser


def main():
    """The command line."""
    args = make_parser().parse_args()
    check_device(args.device)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    # An adapter belongs on the 4-bit base that it was trained over; a merged folder has none.
    quantize = "nf4" if args.adapter and not args.no_quantize else None
    model = load_llama(args.model, device, dtype, quantize)
    if args.adapter:
        load_adapter(model, args.adapter, "adapter")
    tokenizer = load_tokenizer(args.model)
    check_fit(args.model, tokenizer, model.config, 0)

    def answer(question):
        length = len(tokenizer.encode(format_prompt(question), bos=True))
        if length >= model.config.max_position_embeddings:
            context = f"the model's context has {model.config.max_position_embeddings}"
            raise InputError(f"the question has {length} tokens, and {context}: none is left")
        sampling = dict(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
        return generate(model, tokenizer, question, args.max_new_tokens, **sampling)

    if args.prompt is not None:
        print(answer(args.prompt))
        return
    print("Ask a question; an empty line or Ctrl-D ends.")
    while question := read_line():
        print(answer(question))


def read_line() -> str:
    """A line from the terminal, empty at its end."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
    except UnicodeDecodeError:
        raise InputError("the question is not text in UTF-8") from None
