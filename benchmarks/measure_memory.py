"""What benchmarks/memory.py measures: the bytes of a DPO step on the real model.

    python benchmarks/measure_memory.py --model random:smollm2-135m

By itself it counts the bytes of the tensors in this process, and prints them as a line of JSON.
"""

import argparse
import json
import sys
from contextlib import contextmanager

import torch
from models import model_folder
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
    step_flags,
    step_parser,
)

from dpo_minimal.llama import rotary_table
from dpo_minimal.loss import CHUNK, chunk_logps
from dpo_minimal.nf4 import NF4Linear, dequantize_nf4, keep_weights


def measure_in_two_processes(args) -> dict:
    """The measurements of two processes: an ordinary one, and one that counts its tensors.

    A process holds more than its tensors, and the C library keeps freed memory for later. In the
    process that counts, it is told to give back every block of more than 64 KiB at once.
    """
    model_folder(args.model, args.scratch)  # made here: the other processes only read it
    usual = run_alone("step.py", step_flags(args))
    for phase in ("load", "step"):
        seconds, peak = usual[f"{phase}_seconds"], usual[f"{phase}_peak_bytes"] / 1e9
        tell(f"{phase}: {seconds:.1f} s, peak {peak:.2f} GB")
    flags, threshold = step_flags(args), str(2**16)
    result = run_alone("measure_memory.py", flags, MALLOC_MMAP_THRESHOLD_=threshold)
    tensors = result["measured"]["all tensors at the peak"]
    process = {
        "Python and libraries": result["libraries"],
        "freed, not given back": usual["step_peak_bytes"] - tensors - result["libraries"],
        "peak of the process in a step": usual["step_peak_bytes"],
        "peak of the process in loading": usual["load_peak_bytes"],
    }
    return result | {"usual": usual, "process": process}


def measure(args) -> dict:
    """Build the model, take two steps, count the bytes of each component and of all at the peak."""
    # First a very small step, which loads the libraries. All that is added later is the model's.
    tiny = {"model": "random:tiny", "pairs": 1, "length": 64, "prompt": 32, "steps": 1}
    measure_step(argparse.Namespace(**vars(args) | tiny))
    libraries = memory_now(args.device)
    model = build_model(args)
    batch = make_batch(args, model.config.vocab_size)
    step, parameters, optimizer = make_step(model, batch)
    step()  # the first step also makes the moments of AdamW
    tell("measured: one step taken")
    reset_peak(args.device)
    step()
    peak = peak_memory(args.device) - libraries
    measured = tensor_bytes(model, optimizer, args) | saved_bytes(model, batch, args)
    measured["gradients"] = sum(p.grad.nbytes for p in parameters)  # of saved_bytes' backward
    measured["all tensors at the peak"] = peak
    return {"libraries": libraries, "measured": measured}


def tell(text: str):
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def tensor_bytes(model, optimizer, args) -> dict[str, int]:
    """Bytes of the tensors that stay. Each tensor is counted once, even if it is used twice."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    named = dict(model.named_parameters())  # a tied head is in it once
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
        "dequantized weights": sum(sizes) if args.gradient_checkpointing else max(sizes),
    }


def saved_bytes(model, batch, args) -> dict[str, int]:
    """Bytes that autograd saves: in a step, in one block alone, in the last chunk of the head."""
    rows = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    own = [*model.parameters(), *model.buffers(), *rows]
    with counted(own) as step:
        loss = dpo_losses(model, batch).mean()
    loss.backward()
    x = model.model.embed_tokens(batch.tokens).requires_grad_()
    tables = rotary_table(model.config, batch.positions, torch.float32)
    # The input of the recomputed block is a checkpoint, so it is counted there and not here. Its
    # dequantized weights are counted in tensor_bytes.
    keep_weights(model, False)
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
        "one block, recomputed": sum(block.values()) if args.gradient_checkpointing else 0,
        "last chunk of logits": logits,
    }


@contextmanager
def counted(excluded):
    """Collect what autograd saves, as {storage: bytes}, without the storages of `excluded`."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # keeps it alive, so no other tensor gets its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


if __name__ == "__main__":
    print(json.dumps(measure(read_arguments(step_parser(__doc__)))))
