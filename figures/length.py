"""Length: the effect of voters who like long answers, and of a mean instead of a sum.

    python figures/length.py [--draw]

These voters add half a point per word to the score of the judge. With a sum the optimum is then
pi_ref exp((r + words / 2) / beta) / Z, so the taste is learned as if it were quality. With a mean
of the log-probabilities over the |y| tokens, beta h(y) / |y| = r(y) + c, where h is the log-ratio
and c makes the policy sum to 1. So long answers move |y| times as far, up or down. With a mean beta
is always 16, about the mean |y|.
"""

import torch
import tuning as t
import world as w
from drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, label, main, tuned_and_optimum

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
    """log pi [Q, Y] with beta (log pi - log pi_ref) / length = r + c. Bisection finds c."""
    ref = ref_logps.log_softmax(dim=1)
    low, high = (torch.full((len(ref), 1), at, dtype=torch.float64) for at in (-100.0, 100.0))
    for _ in range(80):
        c = (low + high) / 2
        too_much = (ref + lengths * (rewards + c) / beta).logsumexp(dim=1, keepdim=True) > 0
        low, high = torch.where(too_much, low, c), torch.where(too_much, c, high)
    return (ref + lengths * (rewards + c) / beta).log_softmax(dim=1)


def counts(world, questions) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and tokens (with EOS) of the answers, float64 [Q, Y] each."""
    words = [[len(a.split()) for a in forum.candidates(q)] for q in questions]
    tokens = [[len(ids) for ids in world.tokens[q][1:]] for q in questions]
    return torch.tensor(words).double(), torch.tensor(tokens).double()


def describe(logps, ref_logps, scores, words) -> dict:
    """`exact_with_share`, and the expected words."""
    found = w.exact_with_share(logps, ref_logps, scores)
    return found | {"words": float((logps.softmax(dim=1) * words).sum(dim=1).mean())}


def compute() -> dict:
    """Measure each policy, tuned and at its optimum, on new questions."""
    world = w.open_world()
    questions = w.asked(world)["held_out"]
    reference = t.reference_table(world)
    ref, scores = w.stack(reference, questions), w.stack(world.scores, questions)
    words, tokens = counts(world, questions)
    data = {"taste": TASTE, "mean_tokens": float(tokens.mean()), "mean_words": float(words.mean())}
    data["reference"] = w.exact(ref, ref, scores)
    data["reference"]["words"] = float((ref.softmax(dim=1) * words).sum(dim=1).mean())
    t.tune_all(RUNS.values())
    for name, recipe in RUNS.items():
        result = t.tune(world, recipe)
        liked = scores + recipe.points_per_word * words
        best = w.optimum(ref, liked, recipe.beta)
        if recipe.mean:
            best = mean_optimum(ref, liked, tokens, recipe.beta)
        data[name] = {
            "settings": result["recipe"],
            "cpu_seconds": result["cpu_seconds"],
            "tuned": describe(t.final_logps(result, "held_out"), ref, scores, words)
            | result["held_out"],
            "optimum": describe(best, ref, scores, words),
        }
    return data


def draw(data, plt):
    """Expected score against expected words, of the reference, each policy and its optimum."""
    figure, axis = plt.subplots(figsize=(6.6, 4.2), layout="constrained")
    start = data["reference"]
    axis.plot(start["words"], start["score"], "s", color=GREY)
    label(axis, start["words"], start["score"], "SFT", GREY)
    for name, colour in COLOURS.items():
        tuned = data[name]["tuned"]
        tuned_and_optimum(axis, tuned, data[name]["optimum"], "words", colour)
        label(axis, tuned["words"], tuned["score"], name, colour, (6, -10))
    axis.set(xlabel="expected words an answer", ylabel="expected true score")
    axis.set_title("A taste for length becomes length (● tuned, ○ optimum)")
    return figure


if __name__ == "__main__":
    main("length", __doc__, compute, draw)
