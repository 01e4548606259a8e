"""Likelihood displacement: chosen answers become less likely while margins rise. When, and why.

    python figures/displacement.py [--draw]

At the optimum an answer's log-ratio is log pi*(y) / pi_ref(y) = r(y) / beta - log Z: answers with
r below beta log Z fall, whether they were chosen or not, and only their distance to the rejected
ones grows. What falls beyond that line has left the 15 answers altogether: DPO's loss never sees
how much probability all answers together have.
"""

from dataclasses import asdict, replace

import torch
import tuning as t
import world as w
from beta import smooth
from closed_form import BETAS, DPO
from record import BLUE, GREEN, GREY, ORANGE, RED, label, main


def expected_ratios(logps, ref_logps, scores) -> dict[str, float]:
    """Mean log-ratios of chosen and rejected answers, and how much of them is the lost mass."""
    ratios = logps - ref_logps
    chosen, rejected = w.vote_weights(scores)
    return {
        "chosen": float((chosen * ratios).sum(dim=1).mean()),
        "rejected": float((rejected * ratios).sum(dim=1).mean()),
        "mass": float((logps.logsumexp(dim=1) - ref_logps.logsumexp(dim=1)).mean()),
    }


def by_score(logps, ref_logps, scores) -> dict[float, float]:
    """The mean log-ratio of the answers that have each true score."""
    ratios = logps - ref_logps
    return {s: float(ratios[scores == s].mean()) for s in sorted(set(scores.flatten().tolist()))}


def compute() -> dict:
    """Exact log-ratios after tuning, and at the optimum, for each beta."""
    world = w.open_world()
    reference = t.reference_table(world)
    data = {"settings": asdict(DPO), "beta": {}}
    for beta in BETAS:
        result = t.tune(world, replace(DPO, beta=beta))
        run = {"steps_a_point": 15}
        for name in ("chosen", "rejected"):
            rewards = smooth(result["rows"], f"rewards/{name}")
            run[f"{name}_course"] = [reward / beta for reward in rewards]
        for kind, questions in w.asked(world).items():
            ref, scores = w.stack(reference, questions), w.stack(world.scores, questions)
            logps = torch.tensor(result[f"{kind}_logps"], dtype=torch.float64)
            best = w.optimum(ref, scores, beta)
            run[kind] = {
                "tuned": expected_ratios(logps, ref, scores),
                "optimum": expected_ratios(best, ref, scores),
                "tuned_by_score": by_score(logps, ref, scores),
                "optimum_by_score": by_score(best, ref, scores),
            }
        data["beta"][beta] = run
    return data


def draw(data, plt):
    """The course of both log-ratios, and the final ones against the true score."""
    figure, (course, final) = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    run = data["beta"]["1.0"]
    for name, colour in (("chosen", BLUE), ("rejected", ORANGE)):
        values = [0, *run[f"{name}_course"]]
        steps = [0, *(15 * i + 7 for i in range(len(values) - 1))]
        course.plot(steps, values, color=colour)
        label(course, steps[-1], values[-1], name, colour)
    course.axhline(0, color=GREY, linewidth=1)
    course.set(
        title="training pairs, β = 1",
        xlabel="step",
        xlim=(0, 130),
        ylabel="log π − log π_ref, nats an answer",
    )
    for beta, colour in (("0.5", GREEN), ("1.0", BLUE), ("2.0", RED)):
        part = data["beta"][beta]["known"]
        tuned, best = part["tuned_by_score"], part["optimum_by_score"]
        x = [float(s) for s in best]
        final.plot(x, list(best.values()), color=colour, linewidth=1)
        final.plot(x, list(tuned.values()), "o", color=colour, markersize=5)
        label(final, x[0], best["-3.0"], f"β = {float(beta):g}", colour, (2, -13))
    final.axhline(0, color=GREY, linewidth=1)
    final.set(title="each answer: tuned (●), optimum (line)", xlim=(-3.3, 4.3))
    final.set_ylim(-13, 3.5)
    final.set_xlabel("true score of the answer")
    figure.suptitle("Chosen answers fall too: only those above β log Z can rise")
    return figure


if __name__ == "__main__":
    main("displacement", __doc__, compute, draw)
