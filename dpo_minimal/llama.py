"""The Llama architecture: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

One transformer for Llama 2, Llama 3, TinyLlama and SmolLM2 (Touvron et al. 2023, arXiv:2307.09288;
Grattafiori et al. 2024, arXiv:2407.21783). Submodules carry the names of the Hugging Face
checkpoints, so that loading one is a copy. Biases, other activations, sliding windows and attention
sinks are left out, because no Llama has them.

Shapes: B batch, T tokens, S tokens with cached ones, D hidden_size, H heads, G key/value heads, K
head_dim, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpo_minimal import InputError


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, with the field names and defaults of a Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's, or None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if groups is None:
            groups = heads
            object.__setattr__(self, "num_key_value_heads", groups)  # the dataclass is frozen
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
            if self.hidden_size % heads:
                raise InputError(f"config: hidden_size {self.hidden_size} over {heads} heads")
        if heads % groups or self.head_dim % 2:
            sizes = f"{heads} heads of size {self.head_dim}, {groups} key/value heads"
            raise InputError(f"config: {sizes} do not go together")


def at_least_float32(x: torch.Tensor) -> torch.dtype:
    """The dtype for sums that 16 bits would spoil: float32, or x's own where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):  # [..., D] -> [..., D]
        wide = x.to(at_least_float32(x))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def inverse_frequencies(config: LlamaConfig, dtype: torch.dtype, device=None) -> torch.Tensor:
    """Radians per position for each of the K/2 planes: theta^(-2i/K), [K/2] (RoFormer, eq. 15).

    A plane is a pair of coordinates. With Llama 3's scaling, planes that turn less than
    `low_freq_factor` times within the original context are slowed by `factor`, fast ones are kept,
    and the ones between are interpolated.
    """
    steps = torch.arange(0, config.head_dim, 2, device=device).to(dtype) / config.head_dim
    frequencies = 1.0 / config.rope_theta**steps
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling["factor"] + keep * frequencies


def rotary_table(config: LlamaConfig, positions: torch.Tensor, dtype: torch.dtype):
    """cos and sin of position times frequency, each [B, 1, T, K/2], for positions int64 [B, T]."""
    frequencies = inverse_frequencies(config, dtype, positions.device)
    angles = positions[:, None, :, None] * frequencies  # [B, 1, T, K/2]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each plane (x_i, x_{i + K/2}) by its angle: the half-split layout. [B, H, T, K]."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention; each key/value head serves H / G neighbouring query heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, K = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.group_size = K, H // G
        self.q_proj = nn.Linear(D, H * K, bias=False)
        self.k_proj = nn.Linear(D, G * K, bias=False)
        self.v_proj = nn.Linear(D, G * K, bias=False)
        self.o_proj = nn.Linear(H * K, D, bias=False)

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, H, T, K]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, G, T, K]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, G, T, K]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # On a CPU the 16-bit kernel's backward takes up to four times as long as the 32-bit one's.
        dtype = at_least_float32(x) if x.device.type == "cpu" else x.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if cache is not None:
            k, v = cache.extend(k, v)  # [B, G, S, K]: those of earlier tokens go first
            assert mask is not None or T in (1, k.shape[2]), "several new tokens need a mask"
        # A CPU's kernel shares k and v itself; but in training its sums would round differently.
        shared = cache is not None and x.device.type == "cpu"
        if self.group_size > 1 and not shared:
            k = k.repeat_interleave(self.group_size, dim=1)  # [B, H, S, K]
            v = v.repeat_interleave(self.group_size, dim=1)  # [B, H, S, K]
        causal = mask is None and T > 1  # a single new token may see all that is cached
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=shared)
        return self.o_proj(y.to(x.dtype).transpose(1, 2).reshape(B, T, -1))  # [B, T, D]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):  # [B, T, D] -> [B, T, D]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then SwiGLU, each on a normalized input and added to the residual stream."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None):  # [B, T, D] -> [B, T, D]
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A decoder-only Llama language model.

    Pads need no mask: rows are padded on the right and attention is causal, so no real token sees
    a pad, and what is computed at the pads is not scored. A mask is for texts that share a row.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each block in backward: time for memory
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=config.initializer_range)
        self.tie()

    def tie(self):
        """Let the head share the embedding's weight, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, tokens, positions=None, mask=None, cache=None):
        """The final normalized hidden states, [B, T, D], for tokens int64 [B, T].

        positions: int64 [B, T] or [1, T], by default 0, 1, 2, ... mask: bool [B, 1, T, S], True
        where a query may attend to a key, by default causal. cache: one `extras.cache.Cache` per
        layer, which keeps keys and values for further calls; those need a mask unless they bring
        one token per row.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # [1, T]
        x = self.model.embed_tokens(tokens)  # [B, T, D]
        cos, sin = rotary_table(self.config, positions, at_least_float32(x))
        for i, block in enumerate(self.model.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled() and cache is None:
                # The non-reentrant kind passes gradients to adapters though x itself is frozen.
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache[i] if cache else None)
        return self.model.norm(x)

    def forward(self, tokens, positions=None, mask=None, cache=None):
        """Logits [B, T, V] for tokens int64 [B, T]; see `hidden` for the other arguments."""
        return self.lm_head(self.hidden(tokens, positions, mask, cache))
