"""Label noise and cDPO: does label smoothing help if a share of the votes is wrong?

    python figures/noise.py [--draw]

If a share e of the votes is turned around, the probability p that an answer wins becomes
q = (1 - e) p + e (1 - p). Smoothing with e does the same to the votes that there are. Both pull q
towards 1/2, so with both the policy has less far to go. The optimum for such a q has no formula, so
it is found numerically.
"""

import torch
import torch.nn.functional as F
import tuning as t
import world as w
from drawing import BLUE, GREY, ORANGE, label, main, tuned_and_optimum

NOISE = (0.0, 0.3)  # shares of wrong votes
CURVE = [0.5 * 1.3**i for i in range(20)]  # betas of the frontier's points
KINDS = {"DPO": 0.0, "cDPO": 0.3}  # label smoothing
COLOURS = {"DPO": BLUE, "cDPO": ORANGE}


def recipes() -> dict[str, t.Recipe]:
    """The policies by kind and share of wrong votes."""
    return {
        f"{kind}, {share:.0%} wrong": t.Recipe(flipped=share, label_smoothing=smoothing)
        for kind, smoothing in KINDS.items()
        for share in NOISE
    }


def softened(p, share: float):
    """The probability that an answer wins after a share of the votes is turned around."""
    return (1 - share) * p + share * (1 - p)


def optimum_of_votes(ref_logps, wins, beta: float) -> torch.Tensor:
    """log pi [Q, Y] that minimizes DPO's expected loss. wins [Q, Y, Y]: how often y beats y'."""
    ref = ref_logps.log_softmax(dim=1)
    rewards = torch.zeros_like(ref, requires_grad=True)  # beta (log pi - log ref) + constant
    optimizer = torch.optim.LBFGS([rewards], max_iter=500, line_search_fn="strong_wolfe")

    def expected_loss():
        optimizer.zero_grad()
        margins = rewards[:, :, None] - rewards[:, None, :]  # [Q, Y, Y]
        loss = -(wins * F.logsigmoid(margins)).sum()
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    return (ref + rewards.detach() / beta).log_softmax(dim=1)


def compute() -> dict:
    """Exact scores and KL of each policy and of its optimum, and the margins in training."""
    world = w.open_world()
    reference, data = t.reference_table(world), {}
    t.tune_all(recipes().values())
    for name, recipe in recipes().items():
        result = t.tune(world, recipe)
        run = {"settings": result["recipe"], "cpu_seconds": result["cpu_seconds"]}
        last = result["rows"][-20:]
        for metric in ("loss", "rewards/margins", "rewards/accuracies"):
            run[metric] = sum(row[metric] for row in last) / len(last)
        for part, questions in w.asked(world).items():
            ref, scores = w.stack(reference, questions), w.stack(world.scores, questions)
            run[part] = w.exact_with_share(t.final_logps(result, part), ref, scores)
            wins = softened(softened(w.win_rates(scores), recipe.flipped), recipe.label_smoothing)
            best = optimum_of_votes(ref, wins, recipe.beta)
            run[f"{part}_optimum"] = w.exact_with_share(best, ref, scores)
        data[name] = run
    ref, scores = (w.stack(table, questions) for table in (reference, world.scores))
    data["frontier"] = w.frontier(ref, scores, CURVE)
    return data


def draw(data, plt):
    """Score against KL on new questions: the frontier, the policies, the optima for the votes."""
    figure, axis = plt.subplots(figsize=(6.6, 4.2), layout="constrained")
    curve = list(reversed(data["frontier"]))
    axis.plot([p["kl"] for p in curve], [p["score"] for p in curve], color=GREY, zorder=1)
    for kind, colour in COLOURS.items():
        for share in NOISE:
            run = data[f"{kind}, {share:.0%} wrong"]
            tuned, text = run["held_out"], f"{kind}, {share:.0%} wrong votes"
            ring = 6 if kind == "DPO" else 11  # DPO on wrong votes has the optimum of cDPO on right
            tuned_and_optimum(axis, tuned, run["held_out_optimum"], "kl", colour, ring)
            label(axis, tuned["kl"], tuned["score"], text, colour, (7, -11))
    axis.set(xlabel="KL to SFT, nats an answer", ylabel="expected true score", xlim=(0.008, 2))
    axis.set_xscale("log")
    axis.set_title("Smoothing does to right votes what wrong votes do (● tuned, ○ optimum)")
    return figure


if __name__ == "__main__":
    main("noise", __doc__, compute, draw)
