"""QLoRA against LoRA against full fine-tuning: what 4 bits cost in the end.

    python figures/precision.py [--draw]

The same base, texts and votes. QLoRA: NF4 base, adapters for SFT and DPO. LoRA: the base in
float32. Full: all weights, trained in SFT and again in DPO, at a third of LoRA's learning rate.
"""

import torch
import tuning as t
import world as w
from record import BLUE, GREEN, GREY, ORANGE, label, main

from dpo_minimal.lora import linear_layers

RUNS = {
    "QLoRA": t.Recipe(),
    "LoRA": t.Recipe(precision="lora"),
    "full": t.Recipe(precision="full", learning_rate=t.FULL_RATE),
}
COLOURS = dict(zip(RUNS, (BLUE, ORANGE, GREEN), strict=True))
OFFSETS = dict(zip(RUNS, ((-8, 5), (8, -10), (8, -10)), strict=True))


def compute() -> dict:
    """Where each pipeline starts after SFT, and where DPO takes it, on new questions."""
    world = w.open_world()
    questions = w.asked(world)["held_out"]
    scores, data = w.stack(world.scores, questions), {}
    for name, recipe in RUNS.items():
        result = t.tune(world, recipe)
        ref = w.stack(t.reference_table(world, precision=recipe.precision), questions)
        logps = torch.tensor(result["held_out_logps"], dtype=torch.float64)
        found = w.exact(logps, ref, scores)
        data[name] = {
            "settings": result["recipe"],
            "cpu_seconds": result["cpu_seconds"],
            **sizes(t.start_policy(recipe)),
            "sft": w.exact(ref, ref, scores),
            "dpo": found | {"share_of_gain": w.share_of_gain(found, ref, scores)},
            "optimum": w.exact(w.optimum(ref, scores, 1.0), ref, scores),
            "sampled": result["held_out"],
            "frontier": [w.exact(w.optimum(ref, scores, b), ref, scores) for b in CURVE],
        }
    return data


CURVE = [0.25 * 1.35**i for i in range(14)]


def sizes(model) -> dict[str, int]:
    """Bytes of the linear layers' base weights as they are kept, and parameters in training."""
    linear = [getattr(layer, "base", layer) for _, _, _, layer in linear_layers(model)]
    tensors = [tensor for layer in linear for tensor in layer.state_dict().values()]
    return {
        "linear_layers_bytes": sum(t.numel() * t.itemsize for t in tensors),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def draw(data, plt):
    """Score against KL to each pipeline's own SFT, with its own frontier."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, colour in COLOURS.items():
        run = data[name]
        curve = [run["sft"], *reversed(run["frontier"])]
        axis.plot([p["kl"] for p in curve], [p["score"] for p in curve], color=colour, alpha=0.5)
        axis.plot(run["dpo"]["kl"], run["dpo"]["score"], "o", color=colour)
        label(axis, run["dpo"]["kl"], run["dpo"]["score"], name, colour, OFFSETS[name])
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set(xlabel="KL to its own SFT, nats an answer", ylabel="expected true score")
    axis.set_title("4 bits cost nothing here; all weights go farther in the same steps")
    return figure


if __name__ == "__main__":
    main("precision", __doc__, compute, draw)
