"""What this machine can do at most, and what share of it a DPO step reaches.

    python benchmarks/floor.py --model random:smollm2-135m --dtype bfloat16

The ceilings are measured here: matrix products, large and square and at the step's own shapes;
copying; dequantizing. The step's products are counted by hand (`products`, `flops`), and two shares
told: of the rate of a large square product, and of the time that the step's own products and
dequantizations take when nothing else is done.
"""

import statistics

import torch
import torch.nn.functional as F
from models import machine_record, write_result
from step import (
    build_model,
    make_batch,
    make_step,
    read_arguments,
    seconds_each,
    settings_record,
    step_parser,
)

from dpo_minimal.loss import CHUNK
from dpo_minimal.nf4 import dequantize_nf4, quantize_nf4

# --- what a step computes ---------------------------------------------------------------------


def block_layers(config) -> dict[str, tuple[int, int]]:
    """{name: (in, out)} of a block's linear layers."""
    D, inner, K = config.hidden_size, config.intermediate_size, config.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    attention = {"q_proj": (D, H * K), "k_proj": (D, G * K), "v_proj": (D, G * K)}
    mlp = {"gate_proj": (D, inner), "up_proj": (D, inner), "down_proj": (inner, D)}
    return attention | {"o_proj": (H * K, D)} | mlp


def products(config, args, batch) -> list[tuple]:
    """The products with the base's weights: (times, rows, in, out, whether it is backward's).

    Forward x W^T; once more where backward recomputes the block, but for its last product, which
    nothing needs again (an adapter there would); backward grad_y W for the input alone, as the base
    is frozen, and not below the first adapter: the first q, k, v need none. The head reads scored
    positions only; all of its chunks but the last are recomputed.
    """
    L, tokens, scored = config.num_hidden_layers, batch.tokens.numel(), int(batch.loss_mask.sum())
    result = []
    for name, (fan_in, fan_out) in block_layers(config).items():
        needed = name != "down_proj" or args.targets == "all" or name in args.targets.split(",")
        forwards = 2 if args.gradient_checkpointing and needed else 1
        backwards = L - (name in ("q_proj", "k_proj", "v_proj"))
        result.append((forwards * L, tokens, fan_in, fan_out, False))
        result.append((backwards, tokens, fan_in, fan_out, True))
    full, last = divmod(scored - 1, CHUNK)
    head = (config.hidden_size, config.vocab_size)
    result += [(2 * full, CHUNK, *head, False), (full, CHUNK, *head, True)]
    result += [(1, last + 1, *head, False), (1, last + 1, *head, True)]
    return [product for product in result if product[0]]


def flops(config, args, batch) -> dict[str, float]:
    """Floating-point operations of a step, a multiplication and an addition being two.

    Adapters: x A^T and (x A^T) B^T for both of a layer; backward the same again for the inputs,
    and for the trained one once more for A and B. Attention: q k^T and p v, five products of that
    size in backward (q k^T again, and the gradients of v, p, q, k), over all of [T, T].
    """
    L, tokens, layers = config.num_hidden_layers, batch.tokens.numel(), block_layers(config)
    forwards = 2 if args.gradient_checkpointing else 1
    wanted = layers if args.targets == "all" else args.targets.split(",")
    adapter = sum(2 * tokens * args.r * sum(layers[name]) for name in wanted)
    width = config.num_attention_heads * config.head_dim
    product = 2 * tokens * batch.tokens.shape[1] * width
    return {
        "base and head": sum(2 * n * m * k * o for n, m, k, o, _ in products(config, args, batch)),
        "adapters": L * adapter * (2 * forwards + 3),
        "attention": L * product * (2 * forwards + 5),
    }


# --- what the machine can do ------------------------------------------------------------------


def product_seconds(rows, fan_in, fan_out, backward, dtype, device, times=7) -> float:
    """The median time of one product with a weight [out, in]."""
    weight = torch.randn(fan_out, fan_in, device=device).to(dtype)
    x = torch.randn(rows, fan_out if backward else fan_in, device=device).to(dtype)
    run = (lambda: x @ weight) if backward else (lambda: F.linear(x, weight))
    return statistics.median(seconds_each(run, times))


def ceilings(args) -> dict[str, float]:
    """Operations a second of a large square product, bytes a second of a large copy."""
    n = args.square
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        seconds = product_seconds(n, n, n, False, dtype, args.device, times=3)
        result[f"{n} x {n} {str(dtype)[6:]}, FLOP/s"] = 2 * n**3 / seconds
    source = torch.ones(2**28, dtype=torch.uint8, device=args.device)
    target = source.clone()
    seconds = statistics.median(seconds_each(lambda: target.copy_(source), 7))
    result["copy, bytes read and written/s"] = 2 * source.nbytes / seconds
    return result


def dequantize_seconds(config, args) -> float:
    """A step's dequantizations by themselves: each layer in forward, and once more in backward.

    (Where a block is recomputed, its weight is kept from there to its backward.)
    """
    total = 0
    for fan_in, fan_out in block_layers(config).values():
        weight = torch.randn(fan_out, fan_in).to(args.device, getattr(torch, args.dtype))
        quantized = quantize_nf4(weight)
        seconds = statistics.median(seconds_each(lambda q=quantized: dequantize_nf4(q), 7))
        total += 2 * config.num_hidden_layers * seconds
    return total


def shape_rates(config, args, batch) -> list[dict]:
    """The time and rate of each of the step's own products."""
    result = []
    for times, rows, fan_in, fan_out, backward in products(config, args, batch):
        shape = (rows, fan_in, fan_out, backward)
        seconds = product_seconds(*shape, getattr(torch, args.dtype), args.device)
        names = ("times", "rows", "in", "out", "backward", "seconds", "flops_per_second")
        rate = 2 * rows * fan_in * fan_out / seconds
        result.append(dict(zip(names, (times, *shape, seconds, rate), strict=True)))
    return result


# --- both -------------------------------------------------------------------------------------


def measure(args) -> dict:
    """The step, its count, the ceilings and the shares."""
    model = build_model(args)
    batch, config = make_batch(args, model.config.vocab_size), model.config
    seconds = statistics.median(seconds_each(make_step(model, batch)[0], args.steps))
    del model
    counted = flops(config, args, batch)
    shapes = shape_rates(config, args, batch)
    result = {"ceilings": ceilings(args), "shapes": shapes, "flops": counted}
    square = result["ceilings"][f"{args.square} x {args.square} {args.dtype}, FLOP/s"]
    own = sum(shape["times"] * shape["seconds"] for shape in shapes)
    dequantizing = dequantize_seconds(config, args)
    result["step"] = {
        "seconds": seconds,
        "tokens": batch.num_tokens,
        "tokens computed (a shared prompt once)": batch.tokens.numel(),
        "tokens_per_second": batch.num_tokens / seconds,
        "flops_per_second": sum(counted.values()) / seconds,
        "share of the square product's rate": sum(counted.values()) / seconds / square,
        "seconds of its products alone": own,
        "seconds of its dequantizations alone": dequantizing,
        "share of these two in the step": (own + dequantizing) / seconds,
    }
    return result


def show(result: dict):
    """Print the ceilings, the step's products, and the shares."""
    for name, value in result["ceilings"].items():
        print(f"{name:42}{value / 1e9:>12,.1f} G")
    print(f"\n{'product':>42}{'times':>8}{'ms':>10}{'GFLOP/s':>12}")
    for shape in result["shapes"]:
        pattern = (
            "[{rows}, {out}] @ [{out}, {in}]"
            if shape["backward"]
            else "[{rows}, {in}] @ [{in}, {out}]"
        )
        print(
            f"{pattern.format(**shape):>42}{shape['times']:>8}{shape['seconds'] * 1e3:>10.2f}"
            f"{shape['flops_per_second'] / 1e9:>12,.1f}"
        )
    print()
    for name, value in result["flops"].items():
        print(f"{name + ', GFLOP a step':42}{value / 1e9:>12,.1f}")
    for name, value in result["step"].items():
        scaled, form = (value / 1e9, ",.1f") if value > 1e7 else (value, ",.3f")
        print(f"{name + (' / 1e9' if value > 1e7 else ''):42}{scaled:>12{form}}")


def main():
    """The command line: the table, and with --json the figures."""
    parser = step_parser(__doc__)
    parser.add_argument("--square", type=int, default=4096, help="rows of the large product")
    args = read_arguments(parser)
    result = {"machine": machine_record(), "settings": settings_record(args)} | measure(args)
    show(result)
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    main()
