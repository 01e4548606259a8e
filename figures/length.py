"""Length: what voters' taste for long answers does, and what a mean instead of a sum does.

    python figures/length.py [--draw]

The taste adds half a point a word to what the judge would say. With a sum the optimum then is
pi_ref exp((r + words / 2) / beta) / Z: the taste is learned as if it were quality. With a mean of
the log-probabilities over the |y| tokens, beta h(y) / |y| = r(y) + c, with c such that the policy
sums to 1: long answers move |y| times as far, up or down. Taste or not, beta is 16 there, about the
mean |y|.
"""

import torch
import tuning as t
import world as w
from record import BLUE, GREEN, GREY, ORANGE, PURPLE, label, main

from dpo_minimal import forum

TASTE = 0.5
RUNS = {
    "sum, fair votes": t.Recipe(),
    "sum, votes for length": t.Recipe(points_per_word=TASTE),
    "mean, fair votes": t.Recipe(mean=True, beta=16.0),
    "mean, votes for length": t.Recipe(mean=True, beta=16.0, points_per_word=TASTE),
}
COLOURS = dict(zip(RUNS, (BLUE, ORANGE, GREEN, PURPLE), strict=True))


def mean_optimum(ref_logps, rewards, lengths, beta: float) -> torch.Tensor:
    """log pi [Q, Y] with beta (log pi - log pi_ref) / length = r + c, c by bisection."""
    ref = ref_logps.log_softmax(dim=1)
    low, high = (torch.full((len(ref), 1), at, dtype=torch.float64) for at in (-100.0, 100.0))
    for _ in range(80):
        c = (low + high) / 2
        too_much = (ref + lengths * (rewards + c) / beta).logsumexp(dim=1, keepdim=True) > 0
        low, high = torch.where(too_much, low, c), torch.where(too_much, c, high)
    return (ref + lengths * (rewards + c) / beta).log_softmax(dim=1)


def counts(world, questions) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and tokens (EOS included) of the answers, float64 [Q, Y] each."""
    words = [[len(a.split()) for a in forum.candidates(q)] for q in questions]
    tokens = [[len(ids) for ids in world.tokens[q][1:]] for q in questions]
    return torch.tensor(words).double(), torch.tensor(tokens).double()


def describe(logps, ref_logps, scores, words) -> dict:
    """`exact`, the expected words, and the mean log-ratio of short, middling and long answers."""
    pi = logps.log_softmax(dim=1)
    found = w.exact(logps, ref_logps, scores)
    found["words"] = float((pi.exp() * words).sum(dim=1).mean())
    found["share_of_gain"] = w.share_of_gain(found, ref_logps, scores)
    return found


def compute() -> dict:
    """Each policy, tuned and at its optimum, on new questions."""
    world = w.open_world()
    questions = w.asked(world)["held_out"]
    reference = t.reference_table(world)
    ref, scores = w.stack(reference, questions), w.stack(world.scores, questions)
    words, tokens = counts(world, questions)
    data = {"taste": TASTE, "mean_tokens": float(tokens.mean()), "mean_words": float(words.mean())}
    data["reference"] = w.exact(ref, ref, scores)
    data["reference"]["words"] = float((ref.softmax(dim=1) * words).sum(dim=1).mean())
    for name, recipe in RUNS.items():
        result = t.tune(world, recipe)
        liked = scores + recipe.points_per_word * words
        best = w.optimum(ref, liked, recipe.beta)
        if recipe.mean:
            best = mean_optimum(ref, liked, tokens, recipe.beta)
        logps = torch.tensor(result["held_out_logps"], dtype=torch.float64)
        data[name] = {
            "settings": result["recipe"],
            "cpu_seconds": result["cpu_seconds"],
            "tuned": describe(logps, ref, scores, words) | result["held_out"],
            "optimum": describe(best, ref, scores, words),
        }
    return data


def draw(data, plt):
    """Expected score against expected words: the reference, each policy and its optimum."""
    figure, axis = plt.subplots(figsize=(6.6, 4.2), layout="constrained")
    start = data["reference"]
    axis.plot(start["words"], start["score"], "s", color=GREY)
    label(axis, start["words"], start["score"], "SFT", GREY)
    for name, colour in COLOURS.items():
        tuned, best = data[name]["tuned"], data[name]["optimum"]
        x, y = zip(*((p["words"], p["score"]) for p in (tuned, best)), strict=True)
        axis.plot(x, y, ":", color=colour, linewidth=1)
        axis.plot(x[0], y[0], "o", color=colour)
        axis.plot(x[1], y[1], "o", color=colour, markerfacecolor="white")
        label(axis, x[0], y[0], name, colour, (6, -10))
    axis.set(xlabel="expected words an answer", ylabel="expected true score")
    axis.set_title("A taste for length becomes length (● tuned, ○ optimum)")
    return figure


if __name__ == "__main__":
    main("length", __doc__, compute, draw)
