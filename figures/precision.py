"""QLoRA against LoRA against full fine-tuning: what 4 bits cost in the end.

    python figures/precision.py [--draw]

All three have the same base, texts and votes. QLoRA: a base in NF4, adapters for SFT and DPO.
LoRA: the same with the base in float32. Full: SFT and DPO train all weights, at a third of LoRA's
learning rate.
"""

import tuning as t
import world as w
from drawing import BLUE, GREEN, GREY, ORANGE, label, main

from dpo_minimal.lora import linear_layers

RUNS = {
    "QLoRA": t.Recipe(),
    "LoRA": t.Recipe(precision="lora"),
    "full": t.Recipe(precision="full", learning_rate=t.FULL_RATE),
}
CURVE = [0.25 * 1.35**i for i in range(14)]  # betas of the frontier's points
COLOURS = dict(zip(RUNS, (BLUE, ORANGE, GREEN), strict=True))
OFFSETS = dict(zip(RUNS, ((-8, 5), (8, -10), (8, -10)), strict=True))


def compute() -> dict:
    """Where each pipeline starts after SFT, and where DPO takes it, on new questions."""
    world = w.open_world()
    questions = w.asked(world)["held_out"]
    scores, data = w.stack(world.scores, questions), {}
    t.tune_all(RUNS.values())
    for name, recipe in RUNS.items():
        result = t.tune(world, recipe)
        ref = w.stack(t.reference_table(world, precision=recipe.precision), questions)
        data[name] = {
            "settings": result["recipe"],
            "cpu_seconds": result["cpu_seconds"],
            **sizes(t.start_policy(recipe)),
            "sft": w.exact(ref, ref, scores),
            "dpo": w.exact_with_share(t.final_logps(result, "held_out"), ref, scores),
            "optimum": w.exact(w.optimum(ref, scores, 1.0), ref, scores),
            "sampled": result["held_out"],
            "frontier": w.frontier(ref, scores, CURVE),
        }
    return data


def sizes(model) -> dict[str, int]:
    """Bytes of the base weights of the linear layers as stored, and the trained parameters."""
    linear = [getattr(layer, "base", layer) for layer in linear_layers(model).values()]
    tensors = [tensor for layer in linear for tensor in layer.state_dict().values()]
    return {
        "linear_layers_bytes": sum(t.numel() * t.itemsize for t in tensors),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def draw(data, plt):
    """Score against KL for each pipeline, to its own SFT and with its own frontier."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, colour in COLOURS.items():
        run = data[name]
        curve = [run["sft"], *reversed(run["frontier"])]
        style = dict(color=colour, alpha=0.6, linestyle="--" if name == "LoRA" else "-")
        axis.plot([p["kl"] for p in curve], [p["score"] for p in curve], **style)
        axis.plot(run["dpo"]["kl"], run["dpo"]["score"], "o", color=colour)
        label(axis, run["dpo"]["kl"], run["dpo"]["score"], name, colour, OFFSETS[name])
    middle = data["full"]["frontier"][4], data["QLoRA"]["frontier"][3]
    label(axis, middle[0]["kl"], middle[0]["score"], "best after full SFT", GREEN, (-5, 8))
    text = "best after QLoRA's SFT (line)\nand after LoRA's (dashes)"
    label(axis, middle[1]["kl"], middle[1]["score"], text, GREY, (4, -28))
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set(xlabel="KL to its own SFT, nats an answer", ylabel="expected true score")
    axis.set_title("4 bits cost nothing here; all weights go farther in the same steps")
    return figure


if __name__ == "__main__":
    main("precision", __doc__, compute, draw)
