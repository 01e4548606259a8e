"""The command line of generate.py: ask a model a question, or converse with it.

    python -m dpo_minimal.generate --model DIR [--adapter DIR] --prompt TEXT

Without --prompt or --prompts it converses. It speaks the template that the adapter or the model was
tuned in; in a chat template it remembers the conversation, in the blog's each line is a new
question.
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from dpo_minimal import InputError
from dpo_minimal.checkpoint import load_adapter, load_llama
from dpo_minimal.data import encode_example
from dpo_minimal.extras.command_line import real, refuse, temperature, whole, words
from dpo_minimal.extras.flags import check_device, check_template
from dpo_minimal.extras.machine import device_and_dtype
from dpo_minimal.extras.preflight import check_fit
from dpo_minimal.extras.reading import read_json, reading
from dpo_minimal.extras.sampling import ready_to_sample
from dpo_minimal.formats.chat import chosen_template
from dpo_minimal.formats.conversations import Message
from dpo_minimal.generate import make_chooser, sample_steps
from dpo_minimal.tokenizer import load_tokenizer


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description="Ask a model.")
    parser.error = refuse
    add = parser.add_argument
    add("--model", type=words, required=True, help="model folder, Hugging Face or Meta layout")
    add("--adapter", type=words, help="adapter folder, such as runs/forum/dpo")
    add("--prompt", type=words, help="the question; without it, read questions line by line")
    add("--prompts", type=words, metavar="FILE", help="questions, one per line")
    templates = "the blog's text, or a chat (default: as the adapter or the model was tuned)"
    add("--template", choices=("qa", "chat"), help=templates)
    add("--chat-template", type=words, metavar="FILE", help="a Jinja template to ask in")
    add("--max-new-tokens", type=whole(1), default=128, help="tokens of an answer, at most (128)")
    add("--temperature", type=temperature, default=0.0, help="0 (default): greedy")
    add("--top-p", type=real(above=0, high=1), default=1.0, help="likeliest tokens, up to this")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="of the sampling")
    add("--no-quantize", action="store_true", help="even under an adapter")
    add("--device", help="cuda if there is one, else cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU, else float32")
    return parser


def check(args):
    """InputError for flags that make no sense, and for a run in the place of a model."""
    check_device(args.device)
    check_template(args)
    if args.prompt is not None and args.prompts:
        raise InputError("give --prompt or --prompts, not both")
    config = Path(args.model) / "config.json"
    arguments = read_json(config).get("arguments") if config.exists() else None
    if isinstance(arguments, dict):
        run, base = args.model, arguments.get("model") or f"{args.model}/base"
        tuned = f"--model {run}/merged, or --model {base} --adapter {run}/dpo"
        raise InputError(f"{run} is a run, not a model: give {tuned}")


def main():
    """The command line."""
    args = make_parser().parse_args()
    check(args)
    questions = read_questions(args.prompts) if args.prompts else []
    if args.prompt is not None:
        questions = [args.prompt]
    tokenizer = load_tokenizer(args.model, chosen_template(args, args.adapter, args.model))
    device, dtype = device_and_dtype(args.device, args.dtype)
    # An adapter belongs on the 4-bit base that it was trained over; a merged folder has none.
    quantize = "nf4" if args.adapter and not args.no_quantize else None
    model = load_llama(args.model, device, dtype, quantize)
    if args.adapter:
        load_adapter(model, args.adapter, "adapter")
    check_fit(args.model, tokenizer, model.config, 0)

    answer = partial(print_answer, args, model, tokenizer)
    for question in questions:
        answer((Message("user", question),))
    if not questions:
        converse(answer, remember=tokenizer.template is not None)


@torch.no_grad()
def print_answer(args, model, tokenizer, turns) -> str:
    """Answer the last turn, on the screen as the tokens come; it is the text of `generate`."""
    row = check_room(model, tokenizer, turns)
    steps = sample_steps(
        model,
        [row],
        args.max_new_tokens,
        eos_id=tokenizer.eos_id,
        chooser=make_chooser(args.temperature, args.top_p, args.seed),
    )
    text, shown = "", 0
    with ready_to_sample(model):
        for answers in steps:
            text = tokenizer.decode(answers[0]).strip()
            # The bytes of a character may come one by one, and blanks at the end may go again.
            safe = len(text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip())
            if safe > shown:
                print(text[shown:safe], end="", flush=True)
                shown = safe
    print(text[shown:])
    return text


def read_questions(path) -> list[str]:
    """The questions of a file, one per line; InputError if it has none."""
    with reading(path, "a text in UTF-8"):
        lines = Path(path).read_text("utf-8").splitlines()
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise InputError(f"{path}: no question in this file")
    return questions


def check_room(model, tokenizer, prompt) -> list[int]:
    """The prompt in tokens; InputError if it leaves no room for an answer."""
    row = encode_example(tokenizer, prompt)[0]
    tokens = len(row)
    context = model.config.max_position_embeddings
    if tokens >= context:
        begins = prompt[-1].content[:40]
        raise InputError(
            f"a prompt of {tokens} tokens (its last turn begins {begins!r}) leaves no room for an "
            f"answer in the model's context of {context} tokens: shorten it"
        )
    return row


def converse(answer, remember: bool):
    """Read questions from the terminal and let `answer` print, until an empty line.

    remember: each question is asked behind the turns before it, as long as they fit.
    """
    print("Ask a question; an empty line or Ctrl-D ends.")
    turns = ()
    while question := read_line():
        asked = Message("user", question)
        try:
            said = answer((*turns, asked))
        except InputError as error:
            if not turns:
                raise
            print(f"(the conversation begins anew: {error})")
            turns, said = (), answer((asked,))
        if remember:
            turns = (*turns, asked, Message("assistant", said))


def read_line() -> str:
    """A line from the terminal, empty at its end."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""
    except UnicodeDecodeError:
        raise InputError("the question is not text in UTF-8") from None
