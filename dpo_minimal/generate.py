"""Sampling with a key/value cache. `extras/ask.py` is its command line:

python -m dpo_minimal.generate --model DIR [--adapter DIR] --prompt TEXT
"""

from functools import partial

import torch

from dpo_minimal.batches import pad
from dpo_minimal.data import encode_example
from dpo_minimal.extras import progress
from dpo_minimal.extras.cache import Cache
from dpo_minimal.extras.sampling import ready_to_sample

AT_A_TIME = 64  # answers


def choose(logits, temperature: float, top_p: float, generator):
    """The next token of each row, int64 [B], from logits float32 [B, V] on the CPU.

    Temperature 0 takes the likeliest. top_p keeps the fewest likeliest tokens whose probabilities
    add up to top_p (Holtzman et al. 2019, arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        ranked, ids = probabilities.sort(dim=-1, descending=True)
        before = ranked.cumsum(dim=-1) - ranked  # [B, V]
        ranked[before >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, ids, ranked)
    # The largest p / Exp(1) is a draw from p. torch.multinomial takes twice as long for it.
    u = torch.rand(probabilities.shape, dtype=torch.float64, generator=generator)  # [B, V]
    return (probabilities / u.neg_().log1p_().neg_().float()).argmax(dim=-1)


def make_chooser(temperature=1.0, top_p=1.0, seed: int | None = None):
    """`choose` with a random generator of its own; without a seed another one each time."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return partial(choose, temperature=temperature, top_p=top_p, generator=generator)


def sample(model, rows: list[list[int]], max_new_tokens: int, eos_id: int, chooser):
    """Continue token rows; each continuation ends in its EOS or after max_new_tokens."""
    answers = [[] for _ in rows]
    for grown in sample_steps(model, rows, max_new_tokens, eos_id, chooser):
        answers = grown
    return answers


@torch.no_grad()
def sample_steps(model, rows, max_new_tokens: int, eos_id: int, chooser):
    """`sample` token by token: yields the answers so far, lists that grow, after each one.

    chooser: what `make_chooser` returns, or another function of float32 logits [B, V]. The rows are
    padded on the right and read once. Then each call computes one token per row from the cached
    keys and values, at the row's own position, with the pads masked out. A row that has ended is
    left out, but random numbers are drawn for it, so that no row depends on another's end. A row
    ends at the model's context, too; one that leaves no room for an answer gets none.
    """
    device, context = model.lm_head.weight.device, model.config.max_position_embeddings
    room = [min(max_new_tokens, context - len(row)) for row in rows]  # for each answer, in tokens
    most = max(room)
    if most <= 0:
        return
    answers, going = [[] for _ in rows], [i for i, tokens in enumerate(room) if tokens > 0]
    cache = [Cache() for _ in range(model.config.num_hidden_layers)]
    prompts = [rows[i] for i in going]
    lengths = torch.tensor([len(row) for row in prompts], device=device)  # [R], of those going on
    tokens = pad(prompts, 0, torch.int64, device)  # [R, T]
    seen = torch.arange(tokens.shape[1], device=device) < lengths[:, None]  # [R, T]
    hidden = model.hidden(tokens, cache=cache)  # [R, T, D]
    hidden = hidden[torch.arange(len(prompts), device=device), lengths - 1]  # [R, D]
    for step in range(most):
        progress.show(f"sampling {len(rows)} answers", step, most, "tokens at most")
        logits = torch.zeros(len(rows), model.config.vocab_size)  # [B, V]
        logits[going] = model.lm_head(hidden).float().cpu()
        chosen = chooser(logits)[going]  # [R]
        for i, token in zip(going, chosen.tolist(), strict=True):
            answers[i].append(token)
        yield answers
        on = [at for at, i in enumerate(going) if answers[i][-1] != eos_id and step + 1 < room[i]]
        if not on:
            break
        if len(on) < len(going):
            going, chosen = [going[at] for at in on], chosen[on]
            lengths, seen = lengths[on], seen[on]
            for layer in cache:
                layer.keep(on)
        seen = torch.cat((seen, seen.new_ones(len(going), 1)), dim=1)  # [R, T + step + 1]
        positions = (lengths + step)[:, None]  # [R, 1]
        tokens = chosen[:, None].to(device)  # [R, 1]
        hidden = model.hidden(tokens, positions, seen[:, None, None, :], cache)[:, -1]  # [R, D]


def sample_answers(
    model, tokenizer, prompts, max_new_tokens, temperature=1.0, top_p=1.0, seed=None
) -> list[list[int]]:
    """Token ids of an answer to each question. The model's mode is kept."""
    chooser = make_chooser(temperature, top_p, seed)
    rows = [encode_example(tokenizer, prompt)[0] for prompt in prompts]
    answers = []
    with ready_to_sample(model):
        for at in range(0, len(rows), AT_A_TIME):
            part = rows[at : at + AT_A_TIME]
            answers += sample(model, part, max_new_tokens, tokenizer.eos_id, chooser)
    return answers


def generate(
    model, tokenizer, prompt, max_new_tokens: int, temperature=1.0, top_p=1.0, seed=None
) -> str:
    """An answer to one question (or conversation), as text. Greedy at temperature 0."""
    sampling = dict(temperature=temperature, top_p=top_p, seed=seed)
    answers = sample_answers(model, tokenizer, [prompt], max_new_tokens, **sampling)
    return tokenizer.decode(answers[0]).strip()


if __name__ == "__main__":
    from dpo_minimal.extras.ask import main
    from dpo_minimal.extras.command_line import run_command

    run_command(main)
