"""DPO against the closed form: reward and KL, exact over the 15 answers of each question.

    python figures/closed_form.py [--draw]

The optimum at beta is pi* = pi_ref exp(r / beta) / Z over the 15 answers of a question. Here pi_ref
is SFT renormalized over these answers, and r is the true score. Votes are Bradley-Terry with r, so
pi* also minimizes the expected loss of DPO. Compared with DPO: IPO, SFT on chosen answers only,
best of n.
"""

from dataclasses import asdict, replace

import torch
import tuning as t
import world as w
from drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, label, main

BETAS = (0.25, 0.5, 1.0, 2.0)
CURVE = [0.1 * 1.25**i for i in range(28)]  # betas of the frontier's points
DPO = t.Recipe()


def recipes() -> dict[str, t.Recipe]:
    """The policies that are trained, by name."""
    found = {f"DPO {beta:g}": replace(DPO, beta=beta) for beta in BETAS}
    found["DPO 1, every vote certain"] = replace(DPO, expected=True)
    found["IPO 0.2"] = replace(DPO, loss="ipo", beta=0.2)
    return found | {"SFT on chosen": replace(DPO, loss="chosen")}


def best_of(n: int, ref_logps, scores) -> torch.Tensor:
    """log-probabilities [Q, Y] of the best of n answers from pi_ref. A coin decides ties."""
    ref = ref_logps.softmax(dim=1)
    at_most = (ref[:, None] * (scores[:, None] <= scores[:, :, None])).sum(dim=2)  # [Q, Y]
    below = (ref[:, None] * (scores[:, None] < scores[:, :, None])).sum(dim=2)
    # P(the maximum has this score), divided among the answers with this score as in pi_ref.
    return ((at_most**n - below**n) * ref / (at_most - below)).clamp_min(1e-300).log()


def point(logps, ref_logps, scores, beta=None) -> dict:
    """`exact_with_share`, and for a beta also the share of the optimal objective."""
    found = w.exact_with_share(logps, ref_logps, scores)
    if beta:
        start = w.exact(ref_logps, ref_logps, scores)["score"]
        best = w.exact(w.optimum(ref_logps, scores, beta), ref_logps, scores)
        found["optimum"] = best
        reached = found["score"] - beta * found["kl"] - start
        found["share_of_objective"] = reached / (best["score"] - beta * best["kl"] - start)
    return found


def compute() -> dict:
    """Tune all policies. Measure them and the closed forms on known and held-out questions."""
    world = w.open_world()
    t.tune_all(recipes().values())
    tuned = {name: t.tune(world, recipe) for name, recipe in recipes().items()}
    reference = t.reference_table(world)
    seconds = {name: result["cpu_seconds"] for name, result in tuned.items()}
    data = {"settings": asdict(DPO), "cpu_seconds": seconds}
    for kind, questions in w.asked(world).items():
        ref, scores = w.stack(reference, questions), w.stack(world.scores, questions)
        data[kind] = closed_forms(ref, scores)
        for name, result in tuned.items():
            beta = result["recipe"]["beta"] if name.startswith("DPO") else None
            data[kind][name] = point(t.final_logps(result, kind), ref, scores, beta)
    data["sampled"] = {name: result["held_out"] for name, result in tuned.items()}
    return data


def closed_forms(ref, scores) -> dict:
    """What needs no training: the reference, the frontier, best of n, optima of the others."""
    chosen = w.vote_weights(scores)[0].log()  # minimizes the cross-entropy
    ipo = (ref + w.win_rates(scores).mean(dim=2) / 0.2).log_softmax(dim=1)
    return {
        "reference": point(ref, ref, scores),
        "frontier": w.frontier(ref, scores, CURVE),
        "best of n": {n: point(best_of(n, ref, scores), ref, scores) for n in (2, 4, 8, 16)},
        "optimum of SFT on chosen": point(chosen, ref, scores),
        "optimum of IPO 0.2": point(ipo, ref, scores),
    }


def draw(data, plt):
    """Score against KL on new questions: over the 15 answers, and as the policies speak."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.3), sharey=True, layout="constrained")
    part = data["held_out"]
    spoken = {
        name: {"kl": found["sampled_kl"], "score": found["sampled_true_score"]}
        for name, found in data["sampled"].items()
    }
    curve = [part["reference"] | {"kl": 0}, *reversed(part["frontier"])]
    titles = ("over the 15 answers", "as the policy speaks: sampled, judged with all it contains")
    for axis, points, title in zip(panels, (part, spoken), titles, strict=True):
        axis.plot([p["kl"] for p in curve], [p["score"] for p in curve], color=GREY, zorder=1)
        beside = (-4, -26) if points is part else (7, -4)
        label(axis, curve[-1]["kl"], curve[-1]["score"], "the best for its KL", GREY, beside)
        axis.set_xlabel("KL to the reference, nats per answer")
        axis.set_title(title)
        for name, group in groups(points).items():
            x, y = [p["kl"] for p in group.values()], [p["score"] for p in group.values()]
            axis.plot(x, y, LOOKS[name][1], color=LOOKS[name][0], markersize=6)
            for text, p in group.items():
                colour, _, offset = LOOKS[name]
                offset = SPOKEN_OFFSETS.get(text, offset) if points is spoken else offset
                label(axis, p["kl"], p["score"], text, colour, offset)
        axis.plot(0, part["reference"]["score"], "o", color=GREY, markersize=6)
        label(axis, 0, part["reference"]["score"], "SFT over the 15", GREY, (7, -4))
        axis.set_xlim(-0.3, 3.0 if points is part else 4.2)
    panels[0].set_ylabel("true score, new questions")
    share = part["DPO 1"]["share_of_gain"]
    figure.suptitle(
        f"Among the 15 answers DPO at β = 1 gets {share:.0%} of what its KL can buy; "
        "what it really says scores less"
    )
    return figure


# The colour, the marker and the label offset of each group.
LOOKS = {
    "DPO": (BLUE, "o", (7, -9)),
    "variants": (SKY, "D", (-7, 3)),
    "IPO": (ORANGE, "s", (7, -9)),
    "best of": (GREEN, "^", (-6, 4)),
    "SFT": (PURPLE, "v", (7, -9)),
}
SPOKEN_OFFSETS = {  # by the label: there the points are close together
    "DPO, β = 2": (0, -27),
    "IPO, β = 0.2": (0, 20),
    "DPO, β = 1": (4, -15),
    "β = 1, certain votes": (8, 5),
    "DPO, β = 0.25": (-7, -9),
}


def groups(part: dict) -> dict:
    """The points of a panel: {group: {label: point}}. Best of n is known over the 15 alone."""
    found = {
        "DPO": {f"DPO, β = {beta:g}": part[f"DPO {beta:g}"] for beta in BETAS},
        "variants": {"β = 1, certain votes": part["DPO 1, every vote certain"]},
        "IPO": {"IPO, β = 0.2": part["IPO 0.2"]},
        "SFT": {"SFT on chosen": part["SFT on chosen"]},
    }
    best = part.get("best of n", {})
    return found | {"best of": {f"best of {n}": p for n, p in best.items()}}


if __name__ == "__main__":
    main("closed_form", __doc__, compute, draw)
