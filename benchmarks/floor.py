"""How fast this machine can compute at most, and what share of that a DPO step reaches.

    python benchmarks/floor.py --model random:smollm2-135m --dtype bfloat16

The ceilings are measured: matrix products (one large and square, and all those of the step),
copying, dequantizing. The products of the step are counted by hand (`products`, `flops`). The
result is two shares: the step's rate of operations as a share of the large product's rate, and the
time of the step's products and dequantizations alone as a share of the step's time. And it is a
roofline: for each part of a step the least time at the large product's rate, and the time that a
profiler finds.
"""

import statistics
from unittest import mock

import torch
import torch.nn.functional as F
from record import save
from step import build_model, make_batch, make_step, read_arguments, seconds_each, step_parser

from dpo_minimal import nf4
from dpo_minimal.loss import CHUNK
from dpo_minimal.nf4 import dequantize_nf4, quantize_nf4

# --- what a step computes ---------------------------------------------------------------------


def block_layers(config) -> dict[str, tuple[int, int]]:
    """The linear layers of a block, {name: (in, out)}."""
    D, inner, K = config.hidden_size, config.intermediate_size, config.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    attention = {"q_proj": (D, H * K), "k_proj": (D, G * K), "v_proj": (D, G * K)}
    mlp = {"gate_proj": (D, inner), "up_proj": (D, inner), "down_proj": (inner, D)}
    return attention | {"o_proj": (H * K, D)} | mlp


def products(config, args, batch) -> list[tuple]:
    """The products with the base's weights: (times, rows, in, out, whether it is in backward).

    Forward: x W^T. With checkpointing it is done twice, except for the last product of the block:
    nothing needs its result again, unless there is an adapter.
    Backward: grad_y W, for the input only, because the base is frozen. The q, k, v of the first
    block have none, because nothing below them is trained.
    Head: scored positions only. All of its chunks but the last are recomputed.
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
    """Floating-point operations per step. A multiplication and an addition count as two.

    Adapters: x A^T and (x A^T) B^T for both adapters of a layer. Backward does the same again for
    the inputs, and once more for A and B of the trained adapter.
    Attention: q k^T and p v. Backward has five products of that size: q k^T again, and the
    gradients of v, p, q, k. All of [T, T] is counted.
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
    """Operations per second of a large square product, bytes per second of a large copy."""
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
    """The time of a step's dequantizations alone: each layer once in forward, once in backward.

    With checkpointing it is the same number: the weights that are dequantized for the recomputed
    forward are kept for the backward of the block.
    """
    total = 0
    for fan_in, fan_out in block_layers(config).values():
        weight = torch.randn(fan_out, fan_in).to(args.device, getattr(torch, args.dtype))
        quantized = quantize_nf4(weight)
        seconds = statistics.median(seconds_each(lambda q=quantized: dequantize_nf4(q), 7))
        total += 2 * config.num_hidden_layers * seconds
    return total


def shape_rates(config, args, batch) -> list[dict]:
    """The time and the rate of each product of the step."""
    result = []
    for times, rows, fan_in, fan_out, backward in products(config, args, batch):
        shape = (rows, fan_in, fan_out, backward)
        seconds = product_seconds(*shape, getattr(torch, args.dtype), args.device)
        names = ("times", "rows", "in", "out", "backward", "seconds", "flops_per_second")
        rate = 2 * rows * fan_in * fan_out / seconds
        result.append(dict(zip(names, (times, *shape, seconds, rate), strict=True)))
    return result


def seconds_by_part(step, device: str) -> dict[str, float]:
    """Where the time of one step goes, by the names of its operations, from torch's profiler."""
    profiler, on_gpu = torch.profiler, device.startswith("cuda")

    def dequantize(quantized):
        with profiler.record_function("dequantizing"):
            return dequantize_nf4(quantized)

    with mock.patch.object(nf4, "dequantize_nf4", dequantize), profiler.profile() as profile:
        step()
    found = dict.fromkeys(("products", "attention", "dequantizing", "the rest"), 0.0)
    for event in profile.key_averages():
        if (
            event.device_type != torch.autograd.DeviceType.CPU
        ):  # of a kernel; its operation tells it
            continue
        own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        total = (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6
        if event.key == "dequantizing":
            found["dequantizing"] += total
            found["the rest"] += own - total  # its operations are counted below as well
        elif event.key in ("aten::mm", "aten::addmm", "aten::bmm"):
            found["products"] += own
        elif "attention" in event.key:
            found["attention"] += own
        else:
            found["the rest"] += own
    return found


def roofline(counted, rates: dict[str, float], found: dict[str, float]) -> dict[str, dict]:
    """For each part of a step: the least seconds at these FLOP/s, the seconds found, the share."""
    work = {
        "products": counted["base and head"] + counted["adapters"],
        "attention": counted["attention"],
    }
    parts = {}
    for part, seconds in found.items():
        least = work[part] / rates[part] if part in work else 0.0
        share = least / seconds if least else None
        parts[part] = {"floor_seconds": least, "seconds": seconds, "share": share}
    return parts


# --- the comparison ---------------------------------------------------------------------------


def measure(args) -> dict:
    """Time the step, count its operations, measure the ceilings, compute the shares."""
    model = build_model(args)
    batch, config = make_batch(args, model.config.vocab_size), model.config
    step = make_step(model, batch)[0]
    seconds = statistics.median(seconds_each(step, args.steps))
    found = seconds_by_part(step, args.device)
    del model, step
    counted = flops(config, args, batch)
    shapes = shape_rates(config, args, batch)
    result = {"ceilings": ceilings(args), "shapes": shapes, "flops": counted}
    square = result["ceilings"][f"{args.square} x {args.square} {args.dtype}, FLOP/s"]
    rates = {"products": square, "attention": square}
    if args.device == "cpu":  # where attention computes in float32
        rates["attention"] = result["ceilings"][f"{args.square} x {args.square} float32, FLOP/s"]
    result["roofline"] = roofline(counted, rates, found)
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
    """Print the ceilings, the products of the step, and the shares."""
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
        print(f"{name + ', GFLOP per step':42}{value / 1e9:>12,.1f}")
    for name, value in result["step"].items():
        scaled, form = (value / 1e9, ",.1f") if value > 1e7 else (value, ",.3f")
        print(f"{name + (' / 1e9' if value > 1e7 else ''):42}{scaled:>12{form}}")
    print(f"\n{'part of a step':>42}{'floor, ms':>12}{'found, ms':>12}{'share':>8}")
    for name, part in result["roofline"].items():
        share = "-" if part["share"] is None else f"{part['share']:.0%}"
        floor, seconds = part["floor_seconds"] * 1e3, part["seconds"] * 1e3
        print(f"{name:>42}{floor:>12,.0f}{seconds:>12,.0f}{share:>8}")


def main():
    """The command line: print the table, and write the figures if --json is given."""
    parser = step_parser(__doc__)
    parser.add_argument("--square", type=int, default=4096, help="rows of the large product")
    args = read_arguments(parser)
    result = measure(args)
    show(result)
    save(args, result)


if __name__ == "__main__":
    main()
