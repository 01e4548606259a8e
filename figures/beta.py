"""The beta sweep: how fast the policies learn, how far they go, and what they write.

    python figures/beta.py [--draw]

The policies are those of closed_form.py. Only beta differs between them.
"""

from dataclasses import asdict, replace

import tuning as t
import world as w
from closed_form import BETAS, DPO
from drawing import BLUE, GREEN, ORANGE, PURPLE, label, main, thinned, thinned_steps

COLOURS = dict(zip(BETAS, (ORANGE, GREEN, BLUE, PURPLE), strict=True))


def compute() -> dict:
    """What the training runs logged, where they ended, and answers of the policies."""
    world = w.open_world()
    data = {"settings": asdict(DPO), "questions": world.held_out[:4], "beta": {}}
    reference = t.reference_table(world)
    questions = w.asked(world)["held_out"]
    ref, scores = w.stack(reference, questions), w.stack(world.scores, questions)
    t.tune_all(replace(DPO, beta=beta) for beta in BETAS)
    for beta in BETAS:
        result = t.tune(world, replace(DPO, beta=beta))
        data["beta"][beta] = {
            "log_ratio_margins": [m / beta for m in thinned(result["rows"], "rewards/margins")],
            "reward_margins": thinned(result["rows"], "rewards/margins"),
            "loss": thinned(result["rows"], "loss"),
            "held_out": result["held_out"],
            "optimum": w.exact(w.optimum(ref, scores, beta), ref, scores),
            "answers": result["samples"][:4],
            "cpu_seconds": result["cpu_seconds"],
        }
    return data


def draw(data, plt):
    """Margins over steps, in reward and in nats, and where each policy and its optimum are."""
    figure, (speed, nats, end) = plt.subplots(1, 3, figsize=(11, 3.7), layout="constrained")
    for beta, run in data["beta"].items():
        colour = COLOURS[float(beta)]
        for axis, name in ((speed, "reward_margins"), (nats, "log_ratio_margins")):
            steps = thinned_steps(run[name])
            axis.plot(steps, run[name], color=colour)
            label(axis, steps[-1], run[name][-1], f"β = {float(beta):g}", colour, (4, -3))
        found, best = run["held_out"], run["optimum"]
        end.plot(
            [best["kl"], found["kl"]],
            [best["mass"] * best["score"], found["score"]],
            ":",
            color=colour,
            linewidth=1,
        )
        end.plot(best["kl"], best["score"], "o", markerfacecolor="white", color=colour)
        end.plot(found["kl"], found["score"], "o", color=colour)
        label(end, found["kl"], found["score"], f"β = {float(beta):g}", colour, (8, -3))
    speed.set(title="reward margin β·δ", xlabel="step", ylabel="reward")
    nats.set(title="log-ratio margin δ", xlabel="step", ylabel="nats", yscale="log")
    end.set(
        title="new questions: tuned ●, optimum ○",
        xlabel="KL to SFT, nats",
        ylabel="expected true score",
    )
    for axis in (speed, nats):
        axis.set_xlim(0, 140)
    figure.suptitle(
        "The smaller β, the farther the policy goes, and the farther still is its optimum"
    )
    return figure


if __name__ == "__main__":
    main("beta", __doc__, compute, draw)
