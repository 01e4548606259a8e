"""Where the memory of a DPO step goes: predicted from the config alone, and measured.

    python benchmarks/memory.py --model random:smollm2-135m
    python benchmarks/memory.py --model random:llama-2-7b --pairs 1 --length 256 --predict-only

Every component is predicted by a formula below, and measured on the real thing: the bytes of the
model's own tensors and of what autograd saves; so is the peak of all tensors together. What a
process holds beyond its tensors has rows of its own.
"""

import argparse
import json
import sys
from contextlib import contextmanager

import torch
from models import SHAPES, machine_record, model_folder, write_result
from step import (
    build_model,
    dpo_losses,
    make_batch,
    make_step,
    measure_step,
    memory_now,
    peak_memory,
    read_arguments,
    reset_peak,
    run_alone,
    settings_record,
    step_flags,
    step_parser,
)

from dpo_minimal.checkpoint import read_config
from dpo_minimal.llama import Llama, LlamaConfig, rotary_table
from dpo_minimal.loss import CHUNK, chunk_logps
from dpo_minimal.nf4 import NF4Linear, dequantize_nf4

# --- predicted, from the shapes alone ---------------------------------------------------------


def predict(config: LlamaConfig, args) -> dict[str, int]:
    """Bytes of each component."""
    with torch.device("meta"):
        model = Llama(config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    del layers["lm_head"]
    adapted = [layer for name, layer in layers.items() if is_target(name, args)]
    trained = sum(args.r * (layer.in_features + layer.out_features) for layer in adapted)
    sizes = [layer.weight.numel() for layer in layers.values()]
    blocks = [-(-n // 64) for n in sizes]
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    tables = 1 if config.tie_word_embeddings else 2
    e = getattr(torch, args.dtype).itemsize
    one_block = sum(sizes) // config.num_hidden_layers
    return {
        "NF4 codes": sum(-(-n // 2) for n in sizes),  # two weights a byte
        # A byte a block of 64, a float32 scale for each 256 of them, an offset a layer.
        "NF4 absmax": sum(n + 4 * -(-n // 256) + 4 for n in blocks),
        "embedding and head": tables * config.vocab_size * config.hidden_size * e,
        "norms": norms * e,
        "adapters": 2 * 4 * trained,  # float32: `sft`, which is frozen, and `dpo`
        "gradients": 4 * trained,
        "AdamW": 8 * trained + 2 * 4 * len(adapted),  # two moments; a step count for A and B
        **predict_activations(config, args),
        # A recomputed block's weights stay until its backward is through, else one lives at a time.
        "dequantized weights": e * (one_block if recomputes(args) else max(sizes)),
    }


def predict_peak(config: LlamaConfig, args, parts: dict[str, int]) -> int:
    """All tensors at the fuller of two moments of backward: at the head, or within a block."""
    batch = make_batch(args, config.vocab_size, "cpu")
    tokens, scored = batch.tokens.numel(), int(batch.loss_mask.sum())
    e, D, F = getattr(torch, args.dtype).itemsize, config.hidden_size, config.intermediate_size
    passing = ("gradients", "one block, recomputed", "last chunk of logits", "dequantized weights")
    staying = sum(bytes for name, bytes in parts.items() if name not in passing)
    # The log-softmax, its gradient and the logits' gradient: three of [chunk, V] float32.
    at_head = 3 * 4 * min(CHUNK, scored) * config.vocab_size
    # The residual stream's gradient, and those of SwiGLU's two factors and their product.
    in_block = sum(parts[name] for name in passing if name != "last chunk of logits")
    in_block += tokens * e * (D + 3 * F)
    return staying + max(at_head, in_block)


def is_target(name: str, args) -> bool:
    """Whether --targets means this linear layer."""
    last = name.split(".")[-1]
    return args.targets == "all" or last in args.targets.split(",")


def predict_activations(config: LlamaConfig, args) -> dict[str, int]:
    """Bytes that autograd keeps from forward until backward, and those that come and go there."""
    batch = make_batch(args, config.vocab_size, "cpu")
    tokens, scored = batch.tokens.numel(), int(batch.loss_mask.sum())
    e, D, L = getattr(torch, args.dtype).itemsize, config.hidden_size, config.num_hidden_layers
    # The embedding is frozen: until the first adapter nothing needs a gradient, or is kept for one.
    blocks = [block_bytes(config, args, batch, frozen_input=i == 0) for i in range(L)]
    outside = 4 * tokens * config.head_dim  # cos and sin, shared by all blocks
    outside += tokens * (4 * D + 4)  # the final norm
    outside += tokens + 32 * scored  # which answer a token is of; ids and indices of scored tokens
    if scored > CHUNK:  # all chunks of the head but the last are recomputed from their states
        outside += scored * e * D
    last_chunk = (scored - 1) % CHUNK + 1
    return {
        # With checkpointing a block keeps its input, and its inside exists in its own backward.
        "activations kept": outside + (L * tokens * e * D if recomputes(args) else sum(blocks)),
        "one block, recomputed": blocks[-1] if recomputes(args) else 0,
        "last chunk of logits": last_chunk * 4 * config.vocab_size,  # float32
    }


def recomputes(args) -> bool:
    """Whether backward computes each block again."""
    return args.gradient_checkpointing


def block_bytes(config: LlamaConfig, args, batch, frozen_input: bool) -> int:
    """Bytes that autograd saves in one block.

    What an operation keeps for backward, and only where a gradient will pass, a token:
    RMSNorm     its input and 1 / rms, in float32                                4 D + 4
    attention   q, k, v (repeated for all heads), output, log-sum-exp, on a CPU
                in float32; and a row of the mask as numbers                     a (4 H K + T) + 4 H
    SwiGLU      gate, silu(gate), up                                             3 e I
    NF4 linear  nothing: it keeps its packed weight, which is there anyway       0
    adapter     see `adapter_bytes`
    """
    e, D, F = getattr(torch, args.dtype).itemsize, config.hidden_size, config.intermediate_size
    H, K, G = config.num_attention_heads, config.head_dim, config.num_key_value_heads
    tokens, a = batch.tokens.numel(), e if args.device.startswith("cuda") else 4
    # Each stage: its own bytes a token, what it needs a gradient for, its linear layers.
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
    if recomputes(args) and e == 4:
        total -= tokens * 4 * D  # the first norm's input is the checkpoint itself
    return total


def adapter_bytes(adapted, args, tokens: int, e: int, live: bool) -> int:
    """Bytes that the two adapters of each layer (in, out) save; all of them read one input.

    For A's gradient the input behind the dropout, [in] a token; for B's, A x, [r]; for the input's
    own gradient the dropout's mask (numbers on a CPU, booleans on a GPU). Where the layer computes
    in 16 bits, A and B have 16-bit copies: without a live input only the trained B's is needed.
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


# --- measured ---------------------------------------------------------------------------------


def measure(args) -> dict:
    """Build the model, take two steps, count the bytes of each component and of all at the peak."""
    # A step of next to no size first: from here on, what is added is the model's.
    tiny = {"model": "random:tiny", "pairs": 1, "length": 64, "prompt": 32, "steps": 1}
    measure_step(argparse.Namespace(**vars(args) | tiny))
    libraries = memory_now(args.device)
    model = build_model(args)
    batch = make_batch(args, model.config.vocab_size)
    step, parameters, optimizer = make_step(model, batch)
    step()  # the first one also makes AdamW's moments
    tell("measured: one step taken")
    reset_peak(args.device)
    step()
    peak = peak_memory(args.device) - libraries
    measured = tensor_bytes(model, optimizer, args) | saved_bytes(model, batch, args)
    measured["gradients"] = sum(p.grad.nbytes for p in parameters)  # of saved_bytes' backward
    measured["all tensors at the peak"] = peak
    return {"libraries": libraries, "measured": measured}


def tell(text: str):
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def tensor_bytes(model, optimizer, args) -> dict[str, int]:
    """Bytes of the tensors that stay: each is counted once, wherever it appears."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    named = dict(model.named_parameters())  # a tied head appears once
    last_block = [m for m in model.model.layers[-1].modules() if isinstance(m, NF4Linear)]
    sizes = [dequantize_nf4(layer.quantized).nbytes for layer in last_block]
    states = [t for state in optimizer.state.values() for t in state.values()]
    absmax = ("absmax", "absmax_codes", "absmax_scale", "absmax_offset")
    tensors = [getattr(layer, name) for layer in layers for name in absmax]
    kinds = {"norms": "norm", "adapters": "lora_"}
    tables = [p for n, p in named.items() if "embed_tokens" in n or "lm_head" in n]
    return {
        "NF4 codes": sum(layer.packed.nbytes for layer in layers),
        "NF4 absmax": sum(t.nbytes for t in tensors if t is not None),
        "embedding and head": sum(p.nbytes for p in tables),
        **{k: sum(p.nbytes for n, p in named.items() if part in n) for k, part in kinds.items()},
        "AdamW": sum(t.nbytes for t in states),
        "dequantized weights": sum(sizes) if recomputes(args) else max(sizes),
    }


def saved_bytes(model, batch, args) -> dict[str, int]:
    """Bytes that autograd saves: in a step, in one block by itself, in the head's last chunk."""
    rows = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    own = [*model.parameters(), *model.buffers(), *rows]
    with counted(own) as step:
        loss = dpo_losses(model, batch).mean()
    loss.backward()
    x = model.model.embed_tokens(batch.tokens).requires_grad_()
    tables = rotary_table(model.config, batch.positions, torch.float32)
    # The recomputed block's input is a checkpoint, and counted as one.
    with counted([*own, x, *tables]) as block:
        kept = model.model.layers[-1](x, *tables, batch.mask)
    last_chunk = (int(batch.loss_mask.sum()) - 1) % CHUNK + 1
    states = x.detach().flatten(0, 1)[:last_chunk].requires_grad_()
    targets = torch.zeros(last_chunk, dtype=torch.int64, device=x.device)
    with counted([*own, states, targets]) as chunk:
        kept = kept, chunk_logps(states, model.lm_head, targets)
    logits = sum(chunk.values())
    return {
        "activations kept": sum(step.values()) - logits,
        "one block, recomputed": sum(block.values()) if recomputes(args) else 0,
        "last chunk of logits": logits,
    }


@contextmanager
def counted(excluded):
    """Collect what autograd saves as {storage: bytes}, without the storages of `excluded`."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # and so it lives on: no other tensor gets its place

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


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
    """The command line: the table, and with --json the figures."""
    parser = step_parser(__doc__, steps=1)
    parser.add_argument("--predict-only", action="store_true", help="build nothing")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = read_arguments(parser)
    if args.alone:
        print(json.dumps(measure(args)))
        return
    shape = SHAPES.get(args.model.removeprefix("random:"))
    config = LlamaConfig(**shape) if shape else read_config(args.model)
    result = {"machine": machine_record(), "settings": settings_record(args)}
    parts = predict(config, args)
    result["predicted"] = parts | {"all tensors at the peak": predict_peak(config, args, parts)}
    if not args.predict_only:
        result |= measure_alone(args)
    show(result)
    if args.json:
        write_result(args.json, result)


def measure_alone(args) -> dict:
    """The figures of two processes: one as usual, one that counts.

    The C library keeps freed memory for later, and a process holds more than its tensors. In the
    process that counts it is told to give back at once whatever has more than 64 KiB.
    """
    model_folder(args.model, args.scratch)  # made here, so that the other processes only read it
    usual = run_alone("step.py", step_flags(args))
    for phase in ("load", "step"):
        seconds, peak = usual[f"{phase}_seconds"], usual[f"{phase}_peak_bytes"] / 1e9
        tell(f"{phase}: {seconds:.1f} s, peak {peak:.2f} GB")
    flags = [*step_flags(args), "--alone"]
    result = run_alone("memory.py", flags, MALLOC_MMAP_THRESHOLD_=str(2**16))
    tensors = result["measured"]["all tensors at the peak"]
    process = {
        "Python and libraries": result["libraries"],
        "freed, not given back": usual["step_peak_bytes"] - tensors - result["libraries"],
        "peak of the process in a step": usual["step_peak_bytes"],
        "peak of the process in loading": usual["load_peak_bytes"],
    }
    return result | {"usual": usual, "process": process}


if __name__ == "__main__":
    main()
