"""What both sides of against_trl.py are given: pairs, batches, settings and the initial adapter."""

import random

import torch

from dpo_minimal.data import EncodedPair, encode_pairs, load_pairs
from dpo_minimal.evaluate import one_epoch
from dpo_minimal.formats.huggingface import read_config
from dpo_minimal.loop import Settings
from dpo_minimal.tokenizer import load_tokenizer

BETA = 0.1
LORA = {"r": 8, "alpha": 16, "dropout": 0.0, "targets": "q_proj,v_proj"}


def make_settings(args) -> Settings:
    """The settings that both sides train with."""
    warmup = max(1, (args.warmup + args.steps) // 10)
    return Settings(5e-4, args.batch_size, args.grad_accum, warmup_steps=warmup)


@torch.no_grad()
def start_adapter(model):
    """Give the adapter the same random A on every side, so that losses can be compared."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(values)


def pair_tokens(pair: EncodedPair) -> int:
    """Tokens of prompt + chosen and prompt + rejected."""
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def make_batches(folder, args):
    """The encoded pairs, and the batches of all steps as lists of indices."""
    needed = (args.warmup + args.steps) * args.grad_accum
    if args.data:
        texts = load_pairs(args.data, log=lambda line: None)
        pairs = encode_pairs(load_tokenizer(folder), texts, args.length, "pairs")
    else:
        pairs = random_pairs(needed * args.batch_size, read_config(folder).vocab_size, args)
    # Full batches only, because TRL cuts its batches from one list of pairs.
    order = [b for b in one_epoch(pairs, args.batch_size) if len(b) == args.batch_size]
    if len(order) < needed:
        raise SystemExit(
            f"{needed} batches of {args.batch_size} are needed, but the data has {len(order)}"
        )
    return pairs, order[:needed]


def random_pairs(count: int, vocab_size: int, args) -> list[EncodedPair]:
    """Pairs of random token ids, each prompt + answer of --length tokens."""
    rng = random.Random(0)
    prompt = args.prompt_length or args.length // 2
    answer = args.length - prompt

    def tokens(length):
        return rng.choices(range(3, vocab_size), k=length)

    return [EncodedPair(*map(tokens, (prompt, answer, answer))) for _ in range(count)]
