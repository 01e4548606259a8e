"""What takes the memory of a DPO step: predicted from the config alone, and measured.

    python benchmarks/memory.py --model random:smollm2-135m
    python benchmarks/memory.py --model random:llama-2-7b --pairs 1 --length 256 --predict-only

Every component is predicted by a formula in this file, and measured on the real model in
measure_memory.py: the bytes of the model's own tensors, and of what autograd saves. The peak of all
tensors together is predicted and measured too. Memory of the process that is not in tensors has
rows of its own in the table.
"""

import torch
from measure_memory import measure_in_two_processes
from models import SHAPES
from record import save
from step import make_batch, read_arguments, step_parser

from dpo_minimal.formats.huggingface import read_config
from dpo_minimal.llama import Llama, LlamaConfig
from dpo_minimal.lora import linear_layers
from dpo_minimal.loss import CHUNK


def predict(config: LlamaConfig, args) -> dict[str, int]:
    """Bytes of each component."""
    with torch.device("meta"):
        model = Llama(config)
    layers = linear_layers(model)
    adapted = [layer for name, layer in layers.items() if is_target(name, args)]
    trained = sum(args.r * (layer.in_features + layer.out_features) for layer in adapted)
    sizes = [layer.weight.numel() for layer in layers.values()]
    blocks = [-(-n // 64) for n in sizes]
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    tables = 1 if config.tie_word_embeddings else 2
    e = getattr(torch, args.dtype).itemsize
    one_block = sum(sizes) // config.num_hidden_layers
    return {
        "NF4 codes": sum(-(-n // 2) for n in sizes),  # two weights per byte
        # A byte per block of 64, a float32 scale per 256 blocks, an offset per layer.
        "NF4 absmax": sum(n + 4 * -(-n // 256) + 4 for n in blocks),
        "embedding and head": tables * config.vocab_size * config.hidden_size * e,
        "norms": norms * e,
        "adapters": 2 * 4 * trained,  # float32: the frozen `sft`, and `dpo`
        "gradients": 4 * trained,
        "AdamW": 8 * trained + 2 * 4 * len(adapted),  # two moments; a step count for each A and B
        **predict_activations(config, args),
        # With checkpointing all weights of a block stay until its backward is done. Without it
        # there is one at a time.
        "dequantized weights": e * (one_block if args.gradient_checkpointing else max(sizes)),
    }


def predict_peak(config: LlamaConfig, args, parts: dict[str, int]) -> int:
    """Bytes of all tensors in backward, at the head or within a block, whichever is more."""
    batch = make_batch(args, config.vocab_size, "cpu")
    tokens, scored = batch.tokens.numel(), int(batch.loss_mask.sum())
    e, D, F = getattr(torch, args.dtype).itemsize, config.hidden_size, config.intermediate_size
    passing = ("gradients", "one block, recomputed", "last chunk of logits", "dequantized weights")
    staying = sum(bytes for name, bytes in parts.items() if name not in passing)
    # The log-softmax, its gradient and the gradient of the logits, each [chunk, V] in float32.
    at_head = 3 * 4 * min(CHUNK, scored) * config.vocab_size
    # The gradients of the residual stream, of the two factors of SwiGLU, and of their product.
    in_block = sum(parts[name] for name in passing if name != "last chunk of logits")
    in_block += tokens * e * (D + 3 * F)
    return staying + max(at_head, in_block)


def is_target(name: str, args) -> bool:
    """Whether this linear layer is one of --targets."""
    last = name.split(".")[-1]
    return args.targets == "all" or last in args.targets.split(",")


def predict_activations(config: LlamaConfig, args) -> dict[str, int]:
    """Bytes that autograd keeps from forward until backward, and those that it has in between."""
    batch = make_batch(args, config.vocab_size, "cpu")
    tokens, scored = batch.tokens.numel(), int(batch.loss_mask.sum())
    e, D, L = getattr(torch, args.dtype).itemsize, config.hidden_size, config.num_hidden_layers
    # The embedding is frozen: before the first adapter nothing needs a gradient or is kept for one.
    blocks = [block_bytes(config, args, batch, frozen_input=i == 0) for i in range(L)]
    outside = 4 * tokens * config.head_dim  # cos and sin, shared by all blocks
    outside += tokens * (4 * D + 4)  # the final norm
    outside += tokens + 32 * scored  # the answer of each token; ids and indices of the scored ones
    if scored > CHUNK:  # all chunks of the head but the last are recomputed from their states
        outside += scored * e * D
    last_chunk, recomputes = (scored - 1) % CHUNK + 1, args.gradient_checkpointing
    return {
        # With checkpointing a block keeps only its input. The rest exists during its own backward.
        "activations kept": outside + (L * tokens * e * D if recomputes else sum(blocks)),
        "one block, recomputed": blocks[-1] if recomputes else 0,
        "last chunk of logits": last_chunk * 4 * config.vocab_size,  # float32
    }


def block_bytes(config: LlamaConfig, args, batch, frozen_input: bool) -> int:
    """Bytes that autograd saves in one block.

    An operation saves this per token, but only where a gradient will pass:
    RMSNorm     its input and 1 / rms, in float32                                4 D + 4
    attention   q, k, v (repeated for all heads), output, log-sum-exp, on a CPU
                in float32; and a row of the mask as numbers                     a (4 H K + T) + 4 H
    SwiGLU      gate, silu(gate), up                                             3 e F
    NF4 linear  only its packed weight, which is there anyway                    0
    adapter     see `adapter_bytes`
    """
    e, D, F = getattr(torch, args.dtype).itemsize, config.hidden_size, config.intermediate_size
    H, K, G = config.num_attention_heads, config.head_dim, config.num_key_value_heads
    tokens = batch.tokens.numel()
    a = e if args.device.startswith("cuda") else 4  # bytes of a number in attention
    # Each stage: its own bytes per token, and its linear layers.
    stages = [
        (4 * D + 4, {"q_proj": (D, H * K), "k_proj": (D, G * K), "v_proj": (D, G * K)}),
        (a * (4 * H * K + batch.tokens.shape[1]) + 4 * H, {"o_proj": (H * K, D)}),
        (4 * D + 4, {"gate_proj": (D, F), "up_proj": (D, F)}),
        (3 * e * F, {"down_proj": (F, D)}),
    ]
    total, live = 0, not frozen_input
    for own, layers in stages:
        total += tokens * own * live
        adapted = [sizes for name, sizes in layers.items() if is_target(name, args)]
        total += adapter_bytes(adapted, args, tokens, e, live)
        live = live or bool(adapted)
    if args.gradient_checkpointing and e == 4:
        total -= tokens * 4 * D  # the first norm saves the checkpoint itself
    return total


def adapter_bytes(adapted, args, tokens: int, e: int, live: bool) -> int:
    """Bytes that the two adapters of each layer (in, out) save. All layers read the same input.

    Per token: for the gradient of A, the input after dropout, [in]; for that of B, A x, [r]; for
    that of the input, the dropout mask (numbers on a CPU, booleans on a GPU). If the layer computes
    in 16 bits, A and B have 16-bit copies. If the input needs no gradient (not live), only the copy
    of the trained B is saved.
    """
    mask = 1 if args.device.startswith("cuda") else e
    total = 0
    for fan_in, fan_out in adapted:
        if args.dropout:
            total += tokens * fan_in * (e + mask * live)
        total += tokens * args.r * e
        if e < 4:
            total += args.r * e * (2 * (fan_in + fan_out) if live else fan_out)
    if adapted and not args.dropout:
        total += tokens * adapted[0][0] * e
    return total


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
    parts = predict(config, args)
    peak = predict_peak(config, args, parts)
    result = {"predicted": parts | {"all tensors at the peak": peak}}
    if not args.predict_only:
        result |= measure_in_two_processes(args)
    show(result)
    save(args, result)


if __name__ == "__main__":
    main()
