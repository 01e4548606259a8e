"""The memory of a training step, predicted in bytes before it is taken.

`benchmarks/memory.py` compares the parts with what they are measured to be. Pretraining, where all
weights are trained, is not predicted.
"""

from dataclasses import dataclass

import torch

from dpo_minimal.extras.skeleton import skeleton
from dpo_minimal.llama import LlamaConfig
from dpo_minimal.lora import linear_layers
from dpo_minimal.loss import CHUNK


@dataclass(frozen=True)
class Step:
    """What decides on a step's memory. A batch has `tokens` places in rows of `width`, with pads;
    `scored` of them are scored. adapters: 1 in SFT, 2 in DPO, where the first one is frozen."""

    tokens: int
    width: int
    scored: int
    adapters: int
    r: int
    targets: str
    dropout: float
    dtype: torch.dtype
    on_gpu: bool
    gradient_checkpointing: bool
    quantized: bool = True

    def is_target(self, name: str) -> bool:
        """Whether the linear layer of this name has adapters; one of `targets` stands for all
        layers of its last name."""
        last_names = {target.split(".")[-1] for target in self.targets.split(",")}
        return self.targets == "all" or name.split(".")[-1] in last_names


def predict_training(config: LlamaConfig, step: Step) -> dict[str, int]:
    """Bytes of what a step adds to the model and its adapters, by part."""
    layers = linear_layers(skeleton(config))
    adapted = [layer for name, layer in layers.items() if step.is_target(name)]
    trained = sum(step.r * (layer.in_features + layer.out_features) for layer in adapted)
    sizes = [layer.weight.numel() for layer in layers.values()]
    # With checkpointing all weights of a block stay until its backward is done. Without it there
    # is one at a time.
    one_block = sum(sizes) // config.num_hidden_layers
    dequantized = one_block if step.gradient_checkpointing else max(sizes)
    return {
        "gradients": 4 * trained,
        "AdamW": 8 * trained + 2 * 4 * len(adapted),  # two moments; a step count for each A and B
        **predict_activations(config, step),
        "dequantized weights": step.dtype.itemsize * dequantized * step.quantized,
    }


def predict_peak(config: LlamaConfig, step: Step, parts: dict[str, int]) -> int:
    """Bytes of all parts at once in backward, at the head or within a block, whichever is more.

    parts: those of `predict_training`, and any others that stay.
    """
    e, D, F = step.dtype.itemsize, config.hidden_size, config.intermediate_size
    passing = ("gradients", "one block, recomputed", "last chunk of logits", "dequantized weights")
    staying = sum(size for name, size in parts.items() if name not in passing)
    # The log-softmax, its gradient and the gradient of the logits, each [chunk, V] in float32.
    at_head = 3 * 4 * min(CHUNK, step.scored) * config.vocab_size
    # The gradients of the residual stream, of the two factors of SwiGLU, and of their product.
    in_block = sum(parts[name] for name in passing if name != "last chunk of logits")
    in_block += step.tokens * e * (D + 3 * F)
    return staying + max(at_head, in_block)


def predict_activations(config: LlamaConfig, step: Step) -> dict[str, int]:
    """Bytes that autograd keeps from forward until backward, and those that it has in between."""
    e, D, L = step.dtype.itemsize, config.hidden_size, config.num_hidden_layers
    # The embedding is frozen: before the first adapter nothing needs a gradient or is kept for one.
    blocks = [block_bytes(config, step, frozen_input=i == 0) for i in range(L)]
    outside = 4 * step.tokens * config.head_dim  # cos and sin, shared by all blocks
    outside += step.tokens * (4 * D + 4)  # the final norm
    # The answer of each token; ids and indices of the scored ones.
    outside += step.tokens + 32 * step.scored
    if step.scored > CHUNK:  # all chunks of the head but the last are recomputed from their states
        outside += step.scored * e * D
    last_chunk, recomputes = (step.scored - 1) % CHUNK + 1, step.gradient_checkpointing
    return {
        # With checkpointing a block keeps only its input. The rest exists during its own backward.
        "activations kept": outside + (L * step.tokens * e * D if recomputes else sum(blocks)),
        "one block, recomputed": blocks[-1] if recomputes else 0,
        "last chunk of logits": last_chunk * 4 * config.vocab_size,  # float32
    }


def block_bytes(config: LlamaConfig, step: Step, frozen_input: bool) -> int:
    """Bytes that autograd saves in one block.

    An operation saves this per token, but only where a gradient will pass:
    RMSNorm     its input and 1 / rms, in float32                                4 D + 4
    attention   q, k, v (repeated for all heads), output, log-sum-exp, on a CPU
                in float32; and a row of the mask as numbers                     a (4 H K + T) + 4 H
                or, for pairs on a GPU, at most twice the k and v (extras/ragged.py)
    SwiGLU      gate, silu(gate), up                                             3 e F
    linear      only its frozen weight, which is there anyway                    0
    adapter     see `adapter_bytes`
    """
    e, D, F = step.dtype.itemsize, config.hidden_size, config.intermediate_size
    H, K, G = config.num_attention_heads, config.head_dim, config.num_key_value_heads
    a = e if step.on_gpu else 4  # bytes of a number in attention
    more = max(step.width, 2 * H * K) if step.on_gpu and step.adapters == 2 else step.width
    # Each stage: its own bytes per token, and its linear layers.
    stages = [
        (4 * D + 4, {"q_proj": (D, H * K), "k_proj": (D, G * K), "v_proj": (D, G * K)}),
        (a * (4 * H * K + more) + 4 * H, {"o_proj": (H * K, D)}),
        (4 * D + 4, {"gate_proj": (D, F), "up_proj": (D, F)}),
        (3 * e * F, {"down_proj": (F, D)}),
    ]
    total, live = 0, not frozen_input
    for own, layers in stages:
        total += step.tokens * own * live
        adapted = [sizes for name, sizes in layers.items() if step.is_target(name)]
        total += adapter_bytes(adapted, step, live)
        live = live or bool(adapted)
    if step.gradient_checkpointing and e == 4:
        total -= step.tokens * 4 * D  # the first norm saves the checkpoint itself
    return total


def adapter_bytes(adapted, step: Step, live: bool) -> int:
    """Bytes that the adapters of each layer (in, out) save. All layers read the same input.

    Per token: for the gradient of A, the input after dropout, [in]; for that of B, A x, [r]; for
    that of the input, the dropout mask (numbers on a CPU, booleans on a GPU). If the layer computes
    in 16 bits, A and B have 16-bit copies. If the input needs no gradient (not live), only the copy
    of the trained B is saved.
    """
    e = step.dtype.itemsize
    mask, total = 1 if step.on_gpu else e, 0
    for fan_in, fan_out in adapted:
        if step.dropout:
            total += step.tokens * fan_in * (e + mask * live)
        total += step.tokens * step.r * e
        if e < 4:
            copies = step.adapters * (fan_in + fan_out) if live else fan_out
            total += step.r * e * copies
    if adapted and not step.dropout:
        total += step.tokens * adapted[0][0] * e
    return total
