"""Likelihood displacement: when and why chosen answers become less likely while margins rise.

    python figures/displacement.py [--draw]

At the optimum the log-ratio of an answer is log pi*(y) / pi_ref(y) = r(y) / beta - log Z. So
answers with r below beta log Z fall, whether they were chosen or not, and only their distance to
the rejected ones grows. Where answers fall further than that, probability has left the 15 answers:
DPO's loss does not see how much probability all answers have together.
"""

from dataclasses import asdict, replace

import tuning as t
import world as w
from closed_form import BETAS, DPO
from drawing import BLUE, GREEN, GREY, ORANGE, RED, THIN, label, main, thinned, thinned_steps


def expected_ratios(logps, ref_logps, scores) -> dict[str, float]:
    """Mean log-ratios of chosen and rejected answers, and the part of them that is lost mass."""
    ratios = logps - ref_logps
    chosen, rejected = w.vote_weights(scores)
    return {
        "chosen": float((chosen * ratios).sum(dim=1).mean()),
        "rejected": float((rejected * ratios).sum(dim=1).mean()),
        "mass": float((logps.logsumexp(dim=1) - ref_logps.logsumexp(dim=1)).mean()),
    }


def by_score(logps, ref_logps, scores) -> dict[float, float]:
    """The mean log-ratio of the answers with each true score."""
    ratios = logps - ref_logps
    return {s: float(ratios[scores == s].mean()) for s in sorted(set(scores.flatten().tolist()))}


def compute() -> dict:
    """Exact log-ratios after tuning and at the optimum, for each beta."""
    world = w.open_world()
    reference = t.reference_table(world)
    data = {"settings": asdict(DPO), "beta": {}}
    t.tune_all(replace(DPO, beta=beta) for beta in BETAS)
    for beta in BETAS:
        result = t.tune(world, replace(DPO, beta=beta))
        run = {"steps_a_point": THIN}
        for name in ("chosen", "rejected"):
            rewards = thinned(result["rows"], f"rewards/{name}")
            run[f"{name}_course"] = [reward / beta for reward in rewards]
        for kind, questions in w.asked(world).items():
            ref, scores = w.stack(reference, questions), w.stack(world.scores, questions)
            logps = t.final_logps(result, kind)
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
    """Both log-ratios during training, and at the end against the true score."""
    figure, (course, final) = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    run = data["beta"]["1.0"]
    for name, colour in (("chosen", BLUE), ("rejected", ORANGE)):
        values = run[f"{name}_course"]
        steps, values = [0, *thinned_steps(values)], [0, *values]
        course.plot(steps, values, "o-", color=colour, markersize=3)
        label(course, steps[-1], values[-1], name, colour)
    course.axhline(0, color=GREY, linewidth=1)
    course.set(
        title="training pairs, β = 1",
        xlabel=f"step (a point: the mean of {run['steps_a_point']} steps)",
        xlim=(0, 130),
        ylabel="log π − log π_ref, nats an answer",
    )
    for beta, colour in (("0.5", GREEN), ("1.0", BLUE), ("2.0", RED)):
        part = data["beta"][beta]["known"]
        tuned, best = part["tuned_by_score"], part["optimum_by_score"]
        x = [float(s) for s in best]
        final.plot(x, list(best.values()), color=colour, linewidth=1)
        final.plot(x, list(tuned.values()), "o", color=colour, markersize=5)
        middle = (x[1], best["-2.0"]) if beta == "0.5" else (x[0], best["-3.0"])
        label(
            final, *middle, f"β = {float(beta):g}", colour, (10, -12) if beta == "0.5" else (6, -9)
        )
        zero = -float(beta) * best["0.0"]  # where r / beta = log Z
        final.plot(zero, 0, "v", color=colour, markersize=7, zorder=3)
    final.axhline(0, color=GREY, linewidth=1)
    label(final, 0, 0, "▼ β log Z", GREY, (-8, 8))
    final.set(title="each answer: tuned (●), optimum (line)", xlim=(-3.3, 4.3))
    final.set_ylim(-13, 3.5)
    final.set_xlabel("true score of the answer")
    figure.suptitle("Chosen answers fall too: only those above β log Z can rise")
    return figure


if __name__ == "__main__":
    main("displacement", __doc__, compute, draw)
