"""The calls of the network, 4 bits and adapters."""

import types

import torch
from torch import nn

from grader.calls_tools import gradients, module, parameter, tensor

# --- the network ------------------------------------------------------------------------------


def rmsnorm(x, w, eps, dtype="float32", g=None):
    norm = module("llama").RMSNorm(len(w), eps)
    norm.weight = parameter(w, dtype)
    x = tensor(x, dtype, grad=True)
    y = norm(x)
    out = {"y": y, "dtype": y.dtype}
    return out if g is None else out | gradients(y, g, x=x, w=norm.weight)


def rotary(x, positions, theta, dtype="float32", table="float32", g=None):
    llama = module("llama")
    K, heads = x.shape[-1], x.shape[1]
    config = llama.LlamaConfig(8, heads * K, 8, 1, heads, head_dim=K, rope_theta=theta)
    cos, sin = llama.rotary_table(config, tensor(positions, "int64"), getattr(torch, table))
    x = tensor(x, dtype, grad=True)
    y = llama.rotate(x, cos, sin)
    out = {"y": y, "cos shape": list(cos.shape), "dtype": y.dtype}
    return out if g is None else out | gradients(y, g, x=x)


def stand_in_rotate(x, cos, sin):
    """Marks what was rotated, and with which table, without being a rotation."""
    return x * torch.cat((cos, cos), dim=-1).to(x.dtype) + torch.cat((sin, sin), dim=-1).to(x.dtype)


class JoinedCache:
    """What `extras.cache.Cache` does, without its room to grow; the package is the student's."""

    def __init__(self):
        self.joined = None

    def extend(self, k, v):
        """All keys and values, the new ones last."""
        new = torch.stack((k, v))  # [2, B, G, T, K]
        self.joined = new if self.joined is None else torch.cat((self.joined, new), dim=3)
        return self.joined[0], self.joined[1]


def attention(x, wq, wk, wv, wo, heads, cos, sin, mask=None, split=0, dtype="float32", g=None):
    """split: this many tokens are read at once, then the others one by one with the cache."""
    llama = module("llama")
    llama.rotate = stand_in_rotate
    H, G, K = heads
    config = llama.LlamaConfig(8, x.shape[-1], 8, 1, H, num_key_value_heads=G, head_dim=K)
    layer = llama.Attention(config)
    for name, w in zip("qkvo", (wq, wk, wv, wo), strict=True):
        getattr(layer, f"{name}_proj").weight = parameter(w, dtype)
    x, cos, sin = tensor(x, dtype, grad=True), tensor(cos, dtype), tensor(sin, dtype)
    mask = None if mask is None else torch.tensor(mask)
    if split:
        parts = [slice(0, split), *(slice(t, t + 1) for t in range(split, x.shape[1]))]
        cache = JoinedCache()
        y = [layer(x[:, p], cos[:, :, p], sin[:, :, p], None, cache) for p in parts]
        return {"y": torch.cat(y, dim=1)}
    y = layer(x, cos, sin, mask)
    return {"y": y} if g is None else {"y": y} | gradients(y, g, x=x, wk=layer.k_proj.weight)


# --- 4 bits -----------------------------------------------------------------------------------


def nf4_code():
    code = module("nf4").nf4_code()
    return {"code": code, "dtype": code.dtype}


def nf4_outline():
    """What can be said about a code without showing it."""
    code = module("nf4").nf4_code()
    zeros = (code == 0).nonzero().flatten().tolist()
    ascending = bool((code.diff() > 0).all())
    return {"length": len(code), "ends": code[[0, -1]], "zeros": zeros, "ascending": ascending}


def use_code(code):
    """Put the grader's code in place of NF4's, also in tables that were made from it."""
    nf4 = module("nf4")
    nf4.NF4_CODE = tensor(code)
    for value in vars(nf4).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    return nf4


def quantize(weight, code, block_size, double_quant, dtype="float32"):
    q = use_code(code).quantize_nf4(tensor(weight, dtype), block_size, double_quant)
    names = ("packed", "absmax", "absmax_codes", "absmax_scale", "absmax_offset")
    out = {name: getattr(q, name) for name in names if getattr(q, name) is not None}
    if weight.size % 2:  # half of the last byte is unused and may hold anything
        out["packed"] = torch.cat((q.packed[:-1], q.packed[-1:] & 0xF0))
    return out | {"shape": list(q.shape), "dtype": q.dtype}


def dequantize(packed, shape, code, block_size, dtype="float32", **absmax):
    nf4 = use_code(code)
    absmax = {name: torch.tensor(value) for name, value in absmax.items()}
    q = nf4.NF4Weight(
        packed=torch.tensor(packed),
        shape=tuple(shape),
        dtype=getattr(torch, dtype),
        block_size=block_size,
        **absmax,
    )
    y = nf4.dequantize_nf4(q)
    return {"weight": y, "dtype": y.dtype}


def nf4_matmul(x, W, g=None, dtype="float32"):
    """Also counts dequantizations, and looks whether autograd keeps a tensor of W's size."""
    nf4, count, kept = module("nf4"), [], []

    def dequantize_nf4(quantized):
        count.append(1)
        return tensor(W)

    nf4.dequantize_nf4 = dequantize_nf4
    x = tensor(x, dtype, grad=True)
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    )
    with keep:
        y = nf4.NF4Matmul.apply(x, types.SimpleNamespace(weight="packed"))
    forward = len(count)
    if g is None:
        return {"y": y, "dtype": y.dtype}
    (y * tensor(g).to(y)).sum().backward()
    dx = torch.zeros_like(x) if x.grad is None else x.grad
    counts = {"dequantized in forward": forward, "in backward": len(count) - forward}
    return {"y": y, "d x": dx, "W kept": W.size in kept, "dtype": y.dtype, **counts}


# --- adapters ---------------------------------------------------------------------------------


def lora(x, W, factors, alpha, ranks, active, frozen=(), dtype="float32", g=None, **AB):
    """factors: names of adapters; their A and B come as `A name`, `B name`."""
    module_lora = module("lora")
    base = nn.Linear(*W.shape[::-1], bias=False)
    base.weight = nn.Parameter(tensor(W, dtype), requires_grad=False)
    layer, leaves = module_lora.LoRALinear(base), {}
    for name, r in zip(factors, ranks, strict=True):
        dropout = 0.5 if name in frozen else 0.0
        adapter = module_lora.Adapter(W.shape[1], W.shape[0], r, alpha, dropout)
        for letter in "AB":
            weight = parameter(AB[f"{letter} {name}"])
            setattr(adapter, f"lora_{letter}", weight.requires_grad_(name not in frozen))
            leaves[f"{letter} {name}"] = weight
        layer.adapters[name] = adapter
    layer.active = tuple(active)
    layer.train()
    x = tensor(x, dtype, grad=True)
    y = layer(x)
    return {"y": y, "dtype": y.dtype} | ({} if g is None else gradients(y, g, x=x, **leaves))


def new_adapter(sizes, alpha):
    """How a new adapter starts (the spread of A, and B), and when its dropout acts."""
    torch.manual_seed(0)
    into, out, r = sizes
    adapter = module("lora").Adapter(into, out, r, alpha, 0.5)
    A, B = adapter.lora_A.detach(), adapter.lora_B.detach()
    result = {"largest A": A.abs().max(), "mean square of A": A.square().mean(), "B": B}
    result |= {
        "A shape": list(A.shape),
        "A dtype": A.dtype,
        "trained": adapter.lora_A.requires_grad,
    }
    adapter.lora_B.data = torch.ones_like(B)
    x = torch.ones(1, into)
    result["noise in training"] = not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    return result | {"noise in evaluation": not torch.equal(adapter(x), adapter(x))}


def merge(W, names, active, scales, stored="plain", dtype="float32", **AB):
    """stored "NF4": the layer's own weight is in 4 bits and dequantizes to W."""
    module_lora, nf4 = module("lora"), module("nf4")
    nf4.dequantize_nf4 = module_lora.dequantize_nf4 = lambda quantized: tensor(W, dtype)
    if stored == "NF4":
        kept = nf4.NF4Weight(torch.zeros(W.size // 2, dtype=torch.uint8), W.shape, torch.float32)
        nf4.quantize_nf4 = lambda *args, **named: kept
        base = nf4.NF4Linear(kept)
    else:
        base = nn.Linear(*W.shape[::-1], bias=False)
        base.weight = nn.Parameter(tensor(W, dtype), requires_grad=False)
    layer = module_lora.LoRALinear(base)
    for name, scale in zip(names, scales, strict=True):
        adapter = module_lora.Adapter.__new__(module_lora.Adapter)
        nn.Module.__init__(adapter)
        adapter.lora_A, adapter.lora_B = parameter(AB[f"A {name}"]), parameter(AB[f"B {name}"])
        adapter.scale, adapter.dropout = scale, 0.0
        layer.adapters[name] = adapter
    layer.active = tuple(active)
    merged = module_lora.merged_weight(layer)
    return {"weight": merged, "dtype": merged.dtype, "grad": merged.requires_grad}
