"""What is right: every asked-for formula in NumPy, apart from the taught code and from torch.

Each function takes `bug`, the name of a usual mistake, and then gives what that mistake would:
a submission that agrees with it is told what it has done. Precision is that of the inputs; the
grader gives float64. `v` is the variant. Symbols and shapes are those of the taught code.
"""

import math
import re
import zlib
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
    """Blocks, nearest codes, packed; absmax as float32 or quantized in its turn."""
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


# --- losses -----------------------------------------------------------------------------------


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def token_logps(tokens, loss_mask, E, W, sources=None, bug=""):
    """The log-probability of every token, 0 where it is not scored, [B, T]."""
    rows, places = np.nonzero(
        loss_mask | (np.arange(tokens.shape[1]) > 0 if bug == "all scored" else False)
    )
    before = places - {"not shifted": 0, "shifted twice": 2}.get(bug, 1)
    if sources is not None and bug != "sources ignored":
        before = sources[rows, places]
    states = np.cumsum(E[tokens], axis=1)
    logps = log_softmax(states[rows, np.maximum(before, 0)] @ W.T)
    if bug == "logits, not log-probabilities":
        logps = states[rows, before] @ W.T
    grid = np.zeros(tokens.shape)
    grid[rows, places] = logps[np.arange(len(rows)), tokens[rows, places]]
    return grid


def sequence_logps(tokens, loss_mask, E, W, bug=""):
    """The sum over scored tokens of each row."""
    if bug == "last token left out":
        last = loss_mask.shape[1] - 1 - loss_mask[:, ::-1].argmax(axis=1)
        loss_mask = loss_mask.copy()
        loss_mask[np.arange(len(last)), last] = False
    if bug == "mask inverted":
        loss_mask = ~loss_mask & (np.arange(tokens.shape[1]) > 0)
    total = token_logps(tokens, loss_mask, E, W, bug=bug).sum(axis=1)
    if bug == "mean, not sum":
        total = total / loss_mask.sum(axis=1)
    return -total if bug == "sign" else total


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def dpo(pc, pr, rc, rr, beta, label_smoothing=0.0, kind="sigmoid", v=None, bug=""):
    """(losses, chosen rewards, rejected rewards)."""
    if bug == "pair swapped":
        pc, pr, rc, rr = pr, pc, rr, rc
    if bug == "reference left out":
        rc, rr = rc * 0, rr * 0
    chosen, rejected = pc - rc, pr - rr
    e = 0 if bug == "smoothing ignored" else label_smoothing
    inside = {"beta twice": beta**2, "beta left out": 1.0, "sign": -beta}.get(bug, beta)
    h = inside * (chosen - rejected)
    if kind == "sigmoid":
        losses = -(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)
        if v is not None and v.loss == "robust" and bug != "conservative, not robust":
            losses = (-(1 - e) * log_sigmoid(h) + e * log_sigmoid(-h)) / (1 - 2 * e)
    elif kind == "ipo":
        target = 1 / beta if bug == "1 / beta for 1 / (2 beta)" else 1 / (2 * beta)
        losses = (h / beta - target) ** 2
    else:
        losses = np.maximum(0, 1 - h)
    scale = 1.0 if bug == "rewards without beta" else beta
    return losses, scale * chosen, scale * rejected


def logps_gradient(logits, targets, bug=""):
    """d sum_n log softmax(z_n)[c_n] / d z = one-hot - softmax."""
    p = np.exp(log_softmax(logits))
    hot = np.eye(logits.shape[1])[targets]
    by_bug = {"sign": p - hot, "softmax left out": hot, "one-hot left out": -p}
    by_bug["divided by N"] = (hot - p) / len(targets)
    by_bug["transposed softmax"] = hot - np.exp(log_softmax(logits.T)).T
    return by_bug.get(bug, hot - p)


# --- texts to rows ----------------------------------------------------------------------------


def pieces(text, salt, merges=""):
    """The ids of the grader's stand-in for SentencePiece."""
    pattern = (re.escape(merges) + "|" if merges else "") + r" ?[A-Za-z]+| ?[^\sA-Za-z]|\s"
    found = re.findall(pattern, text)
    return [3 + zlib.crc32(f"{salt} {piece}".encode()) % 5000 for piece in found]


def encode(question, answer, salt, merges="", bug=""):
    """Prompt ids with BOS (1), answer ids with EOS (2)."""
    start = f"Question: {question}\n\nAnswer:"
    if bug == "another template":
        start = f"Question: {question}\nAnswer:"
    prompt = [1, *pieces(start, salt, merges)]
    joint = [1, *pieces(f"{start} {answer}", salt, merges), 2]
    if bug == "space with the prompt":
        prompt = [1, *pieces(start + " ", salt, merges)]
        return {"raised": "nothing", "prompt": prompt, "answer": joint[len(prompt) :]}
    if joint[: len(prompt)] != prompt and bug != "merge not noticed":
        return {"raised": "InputError"}
    ids = joint[len(prompt) :]
    ids = {
        "EOS left out": ids[:-1],
        "BOS before the answer": [1, *ids],
        "EOS twice": [*ids, 2],
    }.get(bug, ids)
    if bug == "tokenized apart":
        ids = [*pieces(answer, salt, merges), 2]
    prompt = prompt[1:] if bug == "no BOS" else prompt
    return {"raised": "nothing", "prompt": prompt, "answer": ids}


def encode_pair(pair, max_length, salt, bug=""):
    """Three id lists, or None if the prompt and either answer are too long together."""
    question, *answers = pair
    encoded = [encode(question, answer, salt, bug=bug) for answer in answers]
    prompt, (chosen, rejected) = encoded[0]["prompt"], [e["answer"] for e in encoded]
    longest = max(len(chosen), len(rejected)) if bug != "only chosen measured" else len(chosen)
    longest = len(chosen) + len(rejected) if bug == "both answers measured" else longest
    room = max(0, max_length - len(prompt))
    if bug == "cut":
        return {"encoded": [prompt[:max_length], chosen[:room], rejected[:room]]}
    fits = len(prompt) + longest < max_length + (bug != "one short")
    return {"encoded": [prompt, chosen, rejected] if fits else None}


def answer_rows(examples, v, bug=""):
    """Padded tokens and the mask of what is scored."""
    T = max(len(p) + len(a) for p, a in examples)
    tokens = np.zeros((len(examples), T), np.int64)
    mask = np.zeros((len(examples), T), bool)
    rule = "answer" if bug == "the taught rule" else v.mask
    for i, (p, a) in enumerate(examples):
        n = len(p) + len(a)
        start = T - n if bug == "padded on the left" else 0
        tokens[i, start : start + n] = [*p, *a]
        first, last = len(p) + (rule == "skip first"), n - (rule == "no EOS")
        first = {"prompt scored": 1, "one early": first - 1, "one late": first + 1}.get(bug, first)
        last = {"pads scored": T, "EOS not scored": last - 1}.get(bug, last)
        mask[i, start + first : start + last] = True
    return {"tokens": tokens, "mask": mask}


# --- the training loop ------------------------------------------------------------------------


def rate(step, steps, s, bug=""):
    """Linear warmup, then half a cosine."""
    warmup = s["warmup_steps"]
    if bug == "constant rate":
        return s["learning_rate"]
    if step < warmup:
        return s["learning_rate"] * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return s["learning_rate"] * 0.5 * (1 + math.cos(math.pi * progress))


def training(x, y, w, batches, steps, settings, resume_at=0, evaluates=False, bug=""):
    """AdamW (Loshchilov & Hutter 2019) on mean squared errors, clipped and accumulated."""
    s, each = settings, settings["grad_accum"]
    w, m, u = w.astype(np.float64), 0.0, 0.0
    first = 0 if bug == "starts again from step 0" else resume_at
    used = 0 if bug == "batches read again" else first * each
    seen, kept, tokens = [], 0.0, 1000 if resume_at else 0
    rows = {n: [] for n in ("loss", "miss", "grad_norm", "learning_rate", "num_tokens")}
    for step in range(first, steps):
        parts = batches[used : used + each]
        used += each
        count, sizes = sum(map(len, parts)), [len(p) for p in parts]
        grad, losses, errors = 0.0 * w, [], []
        for indices, n in zip(parts, sizes, strict=True):
            e = x[indices] @ w - y[indices]
            seen.append(w)
            by = {"mean of means": n * each, "micro-batches summed": n}.get(bug, count)
            grad = grad + 2 * e @ x[indices] / by
            losses.append(e**2)
            errors.append(np.abs(e))
        if bug == "gradients not cleared":
            grad = kept = grad + kept
        norm = np.sqrt(np.sum(grad**2))
        if bug != "not clipped":
            grad = grad * min(1.0, s["max_grad_norm"] / (norm + 1e-6))
        kept = grad if bug == "gradients not cleared" else 0.0
        now, t = rate(step, steps, s, bug), step - first + 1
        decay = 0 if bug == "no weight decay" else s["weight_decay"]
        if bug == "Adam with L2":
            grad, decay = grad + decay * w, 0
        m, u = 0.9 * m + 0.1 * grad, 0.999 * u + 0.001 * grad**2
        direction = (m / (1 - 0.9**t)) / (np.sqrt(u / (1 - 0.999**t)) + 1e-8)
        w = w * (1 - now * decay) - now * direction
        tokens += 10 * count
        last = slice(-1, None) if bug == "last micro-batch logged" else slice(None)
        values = (np.concatenate(losses[last]).mean(), np.concatenate(errors[last]).mean())
        for name, value in zip(rows, (*values, norm, now, tokens), strict=True):
            rows[name].append(value)
    every, save = s.get("eval_every", 0), s.get("save_every", 0)
    evaluated = [t for t in range(first, steps) if every and t % every == 0] + [steps]
    return {
        "w": w,
        "weights seen": np.array(seen),
        "steps": list(range(first, steps)),
        "evaluated at": evaluated if evaluates else [],
        "saved at": [t + 1 for t in range(first, steps) if save and (t + 1) % save == 0],
        **{name: np.array(values) for name, values in rows.items()},
    }
