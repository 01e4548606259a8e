"""The right answers: all formulas in NumPy, written independently of the taught code and of torch.

Each function takes `bug`, the name of a usual mistake, and then returns what that mistake gives.
A submission that agrees with it is told which mistake it made. The precision is that of the inputs;
the grader gives float64. `v` is the variant. Symbols and shapes are those of the taught code.
"""

import math
from statistics import NormalDist

import numpy as np

f32 = np.float32


def gradients(f, g, step=1e-5, **leaves) -> dict:
    """d sum(f(**leaves) * g) / d leaf by central differences of fourth order, float64."""
    found = {}
    for name, leaf in leaves.items():
        grad = np.zeros(leaf.shape)
        for place in np.ndindex(leaf.shape):

            def value(by, name=name, leaf=leaf, place=place):
                moved = leaf.copy()
                moved[place] += by
                return np.sum(f(**leaves | {name: moved}) * g)

            near = value(step) - value(-step)
            far = value(2 * step) - value(-2 * step)
            grad[place] = (8 * near - far) / (12 * step)
        found[f"d {name}"] = grad
    return found


# --- the network ------------------------------------------------------------------------------


def rmsnorm(x, w, eps, bug=""):
    """y = w x / sqrt(mean(x^2) + eps), over the last axis."""
    axis = -2 if bug == "over tokens" and x.ndim > 1 else -1
    if bug == "mean taken off":
        x = x - x.mean(axis=-1, keepdims=True)
    square = np.mean(x**2, axis=axis, keepdims=True)
    if bug == "sum, not mean":
        square = np.sum(x**2, axis=-1, keepdims=True)
    root = np.sqrt(square) + eps if bug == "eps outside the root" else np.sqrt(square + eps)
    if bug == "no root":
        root = square + eps
    if bug == "eps left out":
        root = np.sqrt(square)
    return x / root * (1 if bug == "weight left out" else w)


def rotary(x, positions, theta, v, bug=""):
    """Each plane turns by position * theta^(-2i/K); x [B, H, T, K], positions [B, T]."""
    K = x.shape[-1]
    exponent = -1 * np.arange(K // 2) / K if bug == "half the exponent" else -np.arange(0, K, 2) / K
    if bug == "counted in the row":
        positions = np.broadcast_to(np.arange(positions.shape[1]), positions.shape)
    if bug == "positions of the first row":
        positions = np.broadcast_to(positions[:1], positions.shape)
    angles = positions[:, None, :, None] * theta**exponent  # [B, 1, T, K/2]
    cos, sin = np.cos(angles), np.sin(angles)
    sin = -sin if bug == "turned backwards" else sin
    cos, sin = (sin, cos) if bug == "cos and sin swapped" else (cos, sin)
    mixed = bug == "neighbours in, halves out"
    interleaved = (v.rotary == "interleaved") != (bug == "other layout") or mixed
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else np.split(x, 2, axis=-1)
    sign = -1 if bug == "a sign in the second half" else 1
    turned = first * cos - second * sin, second * cos + sign * first * sin
    if interleaved and not mixed:
        return np.stack(turned, axis=-1).reshape(x.shape)
    return np.concatenate(turned, axis=-1)


def attention(x, wq, wk, wv, wo, heads, cos, sin, mask=None, bug=""):
    """Grouped-query causal attention, with the grader's stand-in for `rotate`."""
    H, G, K = heads
    B, T, _ = x.shape

    def split(w, n):
        return (x @ w.T).reshape(B, T, n, K).transpose(0, 2, 1, 3)  # [B, n, T, K]

    def turn(y):
        return y * np.concatenate((cos, cos), -1) + np.concatenate((sin, sin), -1)

    q, k, v = split(wq, H), split(wk, G), split(wv, G)
    q, k = (q if bug == "q not rotated" else turn(q)), (k if bug == "k not rotated" else turn(k))
    v = turn(v) if bug == "v rotated" else v
    order = np.arange(H) % G if bug == "heads in the wrong order" else np.arange(H) // (H // G)
    k, v = k[:, order], v[:, order]  # [B, H, T, K]
    scale = {"not scaled": 1, "divided by K": K, "scaled by the width": math.sqrt(x.shape[-1])}
    S = q @ k.swapaxes(-1, -2) / scale.get(bug, math.sqrt(K))  # [B, H, T, T]
    seen = np.tri(T, dtype=bool)
    if mask is not None and bug != "mask ignored":
        seen = mask
    if bug == "not causal":
        seen = np.ones((T, T), bool)
    S = np.where(seen, S, -np.inf)
    if bug == "masked after the softmax":
        S = np.where(seen, S, 0.0)
    P = np.exp(S - S.max(axis=-1, keepdims=True))
    P = P / P.sum(axis=-1, keepdims=True)
    y = (P @ v).transpose(0, 2, 1, 3)  # [B, T, H, K]
    if bug == "heads not put side by side":
        y = y.transpose(0, 2, 1, 3)
    return y.reshape(B, T, H * K) @ wo.T


# --- 4 bits -----------------------------------------------------------------------------------

OUTERMOST = {"NF4": 0.9677083, "mirrored": 0.9677083, "NF3": 0.9330357}
SIDES = {"NF4": (8, 7), "mirrored": (7, 8), "NF3": (4, 3)}  # values above and below zero


def linspace32(start, end, n):
    """n evenly spaced float32 numbers, each half counted from its own end."""
    start, end = f32(start), f32(end)
    step = np.float64((end - start) / f32(n - 1))
    i = np.arange(n)
    return np.where(i < n // 2, start + step * i, end - step * (n - 1 - i)).astype(f32)


def nf4_code(v, bug=""):
    """Quantiles of the normal, an exact zero, divided by the largest, ascending."""
    quantile, outermost = NormalDist().inv_cdf, OUTERMOST[v.code]
    above, below = SIDES[v.code]
    if bug == "sides swapped":
        above, below = below, above
    space = np.linspace if bug == "spaced in float64" else linspace32
    up = [quantile(float(p)) for p in space(outermost, 0.5, above + 1)[:-1]]
    down = [-quantile(float(p)) for p in space(outermost, 0.5, below + 1)[:-1]]
    values = np.array(sorted(up + [0.0] + down), f32)
    if bug == "evenly spaced":
        return np.linspace(-1, 1, len(values)).astype(f32)
    if bug == "not divided":
        return values
    code = values / np.abs(values).max()
    if bug == "rounded to four digits":
        code = np.round(code, 4).astype(f32)
    return code[::-1].copy() if bug == "descending" else code


def dynamic_code():
    """The 256 values for 8-bit absmax."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = linspace32(0.1, 1, 2**i + 1)
        means = (edges[:-1] + edges[1:]) / f32(2) * f32(10.0 ** (i - 6))
        values += [*means, *-means]
    return np.array(sorted(values), f32)


def nearest(values, code, bug=""):
    if bug == "the next lower code":
        return np.clip(np.searchsorted(code, values, side="right") - 1, 0, None).astype(np.uint8)
    side = "right" if bug == "ties go up" else "left"
    return np.searchsorted((code[:-1] + code[1:]) / f32(2), values, side=side).astype(np.uint8)


def scaled_blocks(values, size, bug=""):
    blocks = np.pad(values, (0, -len(values) % size)).reshape(-1, size)
    absmax = np.abs(blocks).max(axis=1)
    if bug == "largest, not largest magnitude":
        absmax = blocks.max(axis=1)
    if bug == "one absmax for all":
        absmax = np.full_like(absmax, absmax.max())
    with np.errstate(divide="ignore", over="ignore"):
        inverse = f32(1) / np.maximum(absmax, f32(1e-38))
    return blocks * inverse[:, None], absmax


def pack_nibbles(codes, bug=""):
    codes = np.pad(codes, (0, len(codes) % 2))
    first, second = codes[0::2], codes[1::2]
    if bug == "low nibble first":
        first, second = second, first
    return (first << 4 | second).astype(np.uint8)


def quantize(weight, code, block_size, double_quant, bug=""):
    """Blocks, nearest codes, packed; absmax as float32 or quantized as well."""
    flat = (weight.T if bug == "columns first" else weight).astype(f32).reshape(-1)
    scaled, absmax = scaled_blocks(flat, block_size, bug)
    codes = nearest(scaled, code, bug).reshape(-1)[: len(flat)]
    out = {"packed": pack_nibbles(codes, bug)}
    if not double_quant:
        return out | {"absmax": absmax}
    offset = f32(0) if bug == "offset left out" else f32(absmax.mean(dtype=np.float64))
    scaled, scale = scaled_blocks(absmax - offset, 256)
    codes = nearest(scaled, dynamic_code()).reshape(-1)[: len(absmax)]
    return out | {"absmax_codes": codes, "absmax_scale": scale, "absmax_offset": np.array(offset)}


def dequantize(packed, shape, code, block_size, bug="", absmax=None, **double):
    """code * absmax in float32."""
    if absmax is None:
        codes, scale = double["absmax_codes"], double["absmax_scale"]
        which = np.arange(len(codes)) // (64 if bug == "blocks of 64 for absmax too" else 256)
        which = which * 0 if bug == "one scale for all" else np.minimum(which, len(scale) - 1)
        offset = f32(0) if bug == "offset left out" else double["absmax_offset"]
        absmax = dynamic_code()[codes] * scale[which] + offset
    nibbles = (
        (packed & 15, packed >> 4) if bug == "low nibble first" else (packed >> 4, packed & 15)
    )
    n = math.prod(shape)
    values = code[np.stack(nibbles, axis=1).reshape(-1)[:n]]
    blocks = np.arange(n) // block_size
    if bug == "neighbours share no block":
        blocks = np.arange(n) % len(absmax)
    values = values if bug == "absmax left out" else values * absmax[blocks]
    return values.reshape(shape)


def nf4_matmul(x, W, g=None, bug=""):
    """y = x W^T; dx = g W."""
    y = x @ (W if bug == "forward transposed" else W.T)
    if g is None:
        return {"y": y}
    dx = g @ (W.T if bug == "backward transposed" else W)
    return {"y": y, "d x": dx * {"no gradient": 0, "twice the gradient": 2}.get(bug, 1)}


# --- adapters ---------------------------------------------------------------------------------


def lora_scale(alpha, r, v, bug=""):
    root = (v.lora == "alpha/sqrt(r)") != (bug == "other scale")
    return {"alpha alone": alpha, "no scale": 1.0, "r / alpha": r / alpha}.get(
        bug, alpha / math.sqrt(r) if root else alpha / r
    )


def lora(x, W, factors, alpha, ranks, active, v, bug="", **AB):
    """y = W x + sum over active adapters of scale B A x."""
    y = x @ W.T
    chosen = factors if bug == "inactive ones act" else [n for n in factors if n in active]
    chosen = chosen[:1] if bug == "only the first" else chosen
    chosen = chosen[-1:] if bug == "only the last" else chosen
    for name, r in zip(factors, ranks, strict=True):
        if name in chosen:
            update = x @ AB[f"A {name}"].T @ AB[f"B {name}"].T
            y = y + lora_scale(alpha, r, v, bug) * update
    return y - x @ W.T if bug == "base left out" else y


def merge(W, names, active, scales, bug="", **AB):
    """W + sum over active adapters of scale B A."""
    chosen = names if bug == "inactive ones too" else [n for n in names if n in active]
    chosen = {"only the first": chosen[:1], "update lost": []}.get(bug, chosen)
    merged = W.copy()
    for name, scale in zip(names, scales, strict=True):
        if name in chosen:
            update = AB[f"B {name}"] @ AB[f"A {name}"]
            update = (
                update.T if bug == "transposed" and update.shape[0] == update.shape[1] else update
            )
            merged = (
                merged + {"scale left out": 1, "scale twice": scale**2}.get(bug, scale) * update
            )
    return merged
