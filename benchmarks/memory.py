"""What takes the memory of a DPO step: predicted from the config alone, and measured.

    python benchmarks/memory.py --model random:smollm2-135m
    python benchmarks/memory.py --model random:llama-2-7b --pairs 1 --length 256 --predict-only

Every component is predicted by a formula, here and in dpo_minimal/extras/memory.py, and measured on
the real model in measure_memory.py: the bytes of the model's own tensors, and of what autograd
saves. The peak of all tensors together is predicted and measured too. Memory of the process that is
not in tensors has rows of its own in the table.
"""

import torch
from measure_memory import measure_in_two_processes
from models import SHAPES
from record import save
from step import make_batch, read_arguments, step_parser

from dpo_minimal.extras.memory import Step, predict_peak, predict_training
from dpo_minimal.formats.huggingface import read_config
from dpo_minimal.llama import Llama, LlamaConfig
from dpo_minimal.lora import linear_layers


def step_of(config: LlamaConfig, args) -> Step:
    """The flags as a Step."""
    batch = make_batch(args, config.vocab_size, "cpu")
    return Step(
        tokens=batch.tokens.numel(),
        width=batch.tokens.shape[1],
        scored=int(batch.loss_mask.sum()),
        adapters=2,
        r=args.r,
        targets=args.targets,
        dropout=args.dropout,
        dtype=getattr(torch, args.dtype),
        on_gpu=args.device.startswith("cuda"),
        gradient_checkpointing=args.gradient_checkpointing,
    )


def predict(config: LlamaConfig, step: Step) -> dict[str, int]:
    """Bytes of each component: the model and its adapters, then what the step adds to them."""
    with torch.device("meta"):
        model = Llama(config)
    layers = linear_layers(model)
    adapted = [layer for name, layer in layers.items() if step.is_target(name)]
    trained = sum(step.r * (layer.in_features + layer.out_features) for layer in adapted)
    sizes = [layer.weight.numel() for layer in layers.values()]
    blocks = [-(-n // 64) for n in sizes]
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    tables = 1 if config.tie_word_embeddings else 2
    e = step.dtype.itemsize
    return {
        "NF4 codes": sum(-(-n // 2) for n in sizes),  # two weights per byte
        # A byte per block of 64, a float32 scale per 256 blocks, an offset per layer.
        "NF4 absmax": sum(n + 4 * -(-n // 256) + 4 for n in blocks),
        "embedding and head": tables * config.vocab_size * config.hidden_size * e,
        "norms": norms * e,
        "adapters": 2 * 4 * trained,  # float32: the frozen `sft`, and `dpo`
        **predict_training(config, step),
    }


# --- the table --------------------------------------------------------------------------------


def show(result: dict):
    """Print the components and the peaks as a table, in MB of 10^6 bytes."""
    print(f"\n{'MB':32} {'predicted':>12} {'measured':>12} {'ratio':>8}")
    for name, predicted in result["predicted"].items():
        row(name, predicted, result.get("measured", {}).get(name))
    for name, value in result.get("process", {}).items():
        row(name, None, value)
    if "usual" in result:
        seconds = [result["usual"][f"{what}_seconds"] for what in ("load", "step")]
        print("loading took {:.1f} s, a step {:.2f} s".format(*seconds))


def row(name: str, predicted, measured):
    """One line of the table."""
    cells = ["" if value is None else f"{value / 1e6:,.2f}" for value in (predicted, measured)]
    ratio = f"{measured / predicted:.3f}" if predicted and measured else ""
    print(f"{name:32} {cells[0]:>12} {cells[1]:>12} {ratio:>8}")


def main():
    """The command line: print the table, and write the figures if --json is given."""
    parser = step_parser(__doc__, steps=1)
    parser.add_argument("--predict-only", action="store_true", help="build nothing")
    args = read_arguments(parser)
    shape = SHAPES.get(args.model.removeprefix("random:"))
    config = LlamaConfig(**shape) if shape else read_config(args.model)
    step = step_of(config, args)
    parts = predict(config, step)
    peak = predict_peak(config, step, parts)
    result = {"predicted": parts | {"all tensors at the peak": peak}}
    if not args.predict_only:
        result |= measure_in_two_processes(args)
    show(result)
    save(args, result)


if __name__ == "__main__":
    main()
