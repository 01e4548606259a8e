"""The whole network by hand: every forward and every backward pass, in NumPy, without autograd.

This file is the independent witness of the gradient tests, and a chapter to read: how a preference
between two answers becomes a gradient for every weight. Each idea is a pair of pure functions,

    x_forward(inputs) -> y, saved        x_backward(grad_y, saved) -> the gradients of the inputs

where grad_y is dL/dy, of y's shape, and `saved` is what the forward pass must remember. A backward
pass multiplies by the transpose of the forward pass's Jacobian: the equation is beside the line.

Weights and gradients are dicts under the model's own parameter names; `under` and `prefixed` go
into a submodule and out again. Nothing fixes a precision: what goes in as float64 or long double
comes out so. Left out: dropout, packed rows, the key/value cache and 16-bit casts.

Shapes: B batch, T tokens, D hidden_size, H attention heads, G key/value heads, R = H / G heads that
share one, K head_dim, M intermediate_size, V vocabulary, N scored tokens. Of an adapter: A, B its
factors, r its rank, s = alpha / r its scale.
"""

import math

import numpy as np


def under(weights, name):
    """The weights of submodule `name`, under the names they have inside it."""
    return {k.removeprefix(f"{name}."): w for k, w in weights.items() if k.startswith(f"{name}.")}


def prefixed(name, grads):
    """The reverse of `under`, for gradients."""
    return {f"{name}.{key}": grad for key, grad in grads.items()}


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def log_sigmoid(x):
    return -np.logaddexp(0, -x)  # -log(1 + e^-x), without overflow


def outer_sum(a, b):
    """Sum over all tokens of the outer product a b^T: [..., m], [..., n] -> [m, n]."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


# --- Weights in 4 bits: a constant to the gradients ---

NF4_HEX = """bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000
             3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"""
NF4_CODE = np.array([int(word, 16) for word in NF4_HEX.split()], np.uint32).view(np.float32)


def dynamic_code():
    """The 256 signed 8-bit values for absmax: 0, 1, and 2^i midpoints in the i-th of seven decades.

    In float32 throughout, each grid counted from its nearer end, since the last bits matter here.
    """
    low, values = np.float32(0.1), [0.0, 1.0]
    for i in range(7):
        step = np.float64((np.float32(1) - low) / np.float32(2**i))
        j = np.arange(2**i + 1)
        grid = np.where(j < len(j) // 2, low + step * j, 1 - step * j[::-1]).astype(np.float32)
        means = (grid[:-1] + grid[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [*means, *-means]
    return np.array(sorted(values), np.float32)


def nf4_absmax(codes, scale, offset):
    """Double quantization undone: the absmax of each block, float32 [blocks]."""
    return dynamic_code()[codes] * scale[np.arange(len(codes)) // 256] + offset


def nf4_dequantize(packed, absmax, shape):
    """W_i = code[nibble_i] * absmax[i // 64] in float32, high nibbles first; in float64 then."""
    nibbles = np.stack((packed >> 4, packed & 15), axis=1).reshape(-1)[: math.prod(shape)]
    W = NF4_CODE[nibbles] * absmax[np.arange(len(nibbles)) // 64]
    return W.reshape(shape).astype(np.float64)


# --- Embedding: y = E[token] ---


def embedding_forward(tokens, E):  # int [B, T], [V, D] -> [B, T, D]
    return E[tokens], (tokens, E)


def embedding_backward(grad_y, saved):
    tokens, E = saved
    grad_E = np.zeros_like(E)  # [V, D]
    np.add.at(grad_E, tokens, grad_y)  # dL/dE_v = sum of dL/dy_t over the places t of token v
    return grad_E


# --- Linear layer and its stacked adapters: y = W x + sum_a s_a B_a A_a x ---


def linear_forward(x, weights, scales):  # [..., in] -> [..., out]; scales: {adapter: alpha / r}
    y = x @ weights["weight"].T  # W [out, in], one token per row
    for name, s in scales.items():
        A, B = (weights[f"adapters.{name}.lora_{letter}"] for letter in "AB")  # [r, in], [out, r]
        y = y + s * (x @ A.T) @ B.T
    return y, (x, weights, scales)


def linear_backward(grad_y, saved):
    x, weights, scales = saved
    grads = {"weight": outer_sum(grad_y, x)}  # dL/dW = sum_t dL/dy_t x_t^T
    grad_x = grad_y @ weights["weight"]  # dL/dx = W^T dL/dy + sum_a s A^T B^T dL/dy
    for name, s in scales.items():
        A, B = (weights[f"adapters.{name}.lora_{letter}"] for letter in "AB")
        grad_u = s * grad_y @ B  # u = A x, y = s B u: dL/du = s B^T dL/dy
        grads[f"adapters.{name}.lora_A"] = outer_sum(grad_u, x)  # dL/dA = s B^T sum_t dL/dy_t x_t^T
        grads[f"adapters.{name}.lora_B"] = s * outer_sum(grad_y, x @ A.T)  # s sum_t dL/dy_t u_t^T
        grad_x = grad_x + grad_u @ A
    return grad_x, grads


# --- RMSNorm: y_i = w_i x_i rho, rho = (mean(x^2) + eps)^(-1/2) ---


def rmsnorm_forward(x, w, eps):  # [B, T, D], [D] -> [B, T, D]
    rho = (np.mean(x**2, axis=-1, keepdims=True) + eps) ** -0.5  # [B, T, 1]
    return w * x * rho, (x, w, rho)


def rmsnorm_backward(grad_y, saved):
    x, w, rho = saved
    grad_w = np.sum(grad_y * x * rho, axis=(0, 1))  # dL/dw_i = sum_t dL/dy_i x_i rho
    g = grad_y * w  # d rho / dx_j = -rho^3 x_j / D, hence
    grad_x = rho * g - rho**3 * x * np.mean(g * x, axis=-1, keepdims=True)
    return grad_x, grad_w


# --- Rotary embedding: plane (x_i, x_{i + K/2}) turns by position * theta^(-2i/K) ---


def rotary_angles(config, T):
    """position times frequency, [T, K/2]; Llama 3 slows down the planes that turn slowly."""
    frequencies = []
    for i in range(config.head_dim // 2):
        f = config.rope_theta ** (-2 * i / config.head_dim)  # radians per position
        scaling = config.rope_scaling
        if scaling is not None:
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
            if turns < low:
                f = f / scaling["factor"]
            elif turns < high:  # in between: a straight line from slowed to kept
                f = f * (1 + (turns - high) / (high - low) * (1 - 1 / scaling["factor"]))
        frequencies.append(f)
    return np.outer(np.arange(T), frequencies)


def rotary_forward(x, angles):  # [B, T, heads, K], [T, K/2] -> [B, T, heads, K]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]  # [T, 1, K/2]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1), angles


def rotary_backward(grad_y, angles):
    return rotary_forward(grad_y, -angles)[0]  # a rotation's transpose turns the other way


# --- Attention: y = P v, P = softmax(q k^T / sqrt(K)) over the past; R query heads share k, v ---


def attend_forward(q, k, v):  # q [B, T, G, R, K]; k, v [B, T, G, K] -> [B, T, G, R, K]
    T, K = q.shape[1], q.shape[-1]
    S = np.einsum("btgrk,bsgk->bgrts", q, k) / math.sqrt(K)  # [B, G, R, T, T]
    S = np.where(np.tri(T, dtype=bool), S, -np.inf)  # token t sees s <= t
    P = np.exp(S - S.max(axis=-1, keepdims=True))
    P = P / P.sum(axis=-1, keepdims=True)
    return np.einsum("bgrts,bsgk->btgrk", P, v), (q, k, v, P)


def attend_backward(grad_y, saved):
    q, k, v, P = saved
    grad_v = np.einsum("bgrts,btgrk->bsgk", P, grad_y)  # dL/dv = P^T dL/dy, summed over r and t
    grad_P = np.einsum("btgrk,bsgk->bgrts", grad_y, v)  # dL/dP = dL/dy v^T
    # dP_s/dS_u = P_s (1[s = u] - P_u), hence dL/dS = P * (dL/dP - sum_s P_s dL/dP_s)
    grad_S = P * (grad_P - np.sum(P * grad_P, axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])
    grad_q = np.einsum("bgrts,bsgk->btgrk", grad_S, k)  # dL/dq = dL/dS k / sqrt(K)
    grad_k = np.einsum("bgrts,btgrk->bsgk", grad_S, q)  # dL/dk = dL/dS^T q / sqrt(K)
    return grad_q, grad_k, grad_v


def attention_forward(x, weights, scales, angles, config):  # [B, T, D] -> [B, T, D]
    G, K = config.num_key_value_heads, config.head_dim
    R = config.num_attention_heads // G
    flat, saved = {}, {}
    for name in ("q_proj", "k_proj", "v_proj"):
        flat[name], saved[name] = linear_forward(x, under(weights, name), scales)
    q = rotary_forward(flat["q_proj"].reshape(*x.shape[:2], G * R, K), angles)[0]
    k = rotary_forward(flat["k_proj"].reshape(*x.shape[:2], G, K), angles)[0]
    v = flat["v_proj"].reshape(*x.shape[:2], G, K)
    # Query head h belongs to key/value head h // R: neighbours share.
    y, saved["attend"] = attend_forward(q.reshape(*x.shape[:2], G, R, K), k, v)
    y = y.reshape(*x.shape[:2], G * R * K)
    y, saved["o_proj"] = linear_forward(y, under(weights, "o_proj"), scales)
    return y, (saved, angles)


def attention_backward(grad_y, saved):
    saved, angles = saved
    grads = {}
    grad_y, grads["o_proj"] = linear_backward(grad_y, saved["o_proj"])
    q = saved["attend"][0]
    grad_q, grad_k, grad_v = attend_backward(grad_y.reshape(q.shape), saved["attend"])
    B, T, G, R, K = q.shape
    flat = {
        "q_proj": rotary_backward(grad_q.reshape(B, T, G * R, K), angles),
        "k_proj": rotary_backward(grad_k, angles),
        "v_proj": grad_v,
    }
    grad_x = 0
    for name, grad in flat.items():  # x feeds all three: their gradients add
        grad, grads[name] = linear_backward(grad.reshape(B, T, -1), saved[name])
        grad_x = grad_x + grad
    return grad_x, {k: v for name in grads for k, v in prefixed(name, grads[name]).items()}


# --- SwiGLU: y = down(silu(a) * b), a = gate(x), b = up(x), silu(a) = a sigmoid(a) ---


def swiglu_forward(x, weights, scales):  # [B, T, D] -> [B, T, D]
    a, saved_gate = linear_forward(x, under(weights, "gate_proj"), scales)  # [B, T, M]
    b, saved_up = linear_forward(x, under(weights, "up_proj"), scales)  # [B, T, M]
    y, saved_down = linear_forward(a * sigmoid(a) * b, under(weights, "down_proj"), scales)
    return y, (a, b, saved_gate, saved_up, saved_down)


def swiglu_backward(grad_y, saved):
    a, b, saved_gate, saved_up, saved_down = saved
    grad_h, grads_down = linear_backward(grad_y, saved_down)  # h = silu(a) b
    s = sigmoid(a)
    grad_a = grad_h * b * s * (1 + a * (1 - s))  # silu'(a) = s + a s (1 - s)
    grad_b = grad_h * a * s  # dh/db = silu(a)
    grad_x_gate, grads_gate = linear_backward(grad_a, saved_gate)
    grad_x_up, grads_up = linear_backward(grad_b, saved_up)
    grads = prefixed("gate_proj", grads_gate) | prefixed("up_proj", grads_up)
    return grad_x_gate + grad_x_up, grads | prefixed("down_proj", grads_down)


# --- A block, x + attention(norm(x)) then x + swiglu(norm(x)), and the stack of them ---


def block_forward(x, weights, scales, angles, config):  # [B, T, D] -> [B, T, D]
    eps = config.rms_norm_eps
    h, saved_norm1 = rmsnorm_forward(x, weights["input_layernorm.weight"], eps)
    y, saved_attn = attention_forward(h, under(weights, "self_attn"), scales, angles, config)
    x = x + y
    h, saved_norm2 = rmsnorm_forward(x, weights["post_attention_layernorm.weight"], eps)
    y, saved_mlp = swiglu_forward(h, under(weights, "mlp"), scales)
    return x + y, (saved_norm1, saved_attn, saved_norm2, saved_mlp)


def block_backward(grad_y, saved):
    saved_norm1, saved_attn, saved_norm2, saved_mlp = saved
    grad_h, grads_mlp = swiglu_backward(grad_y, saved_mlp)
    grad_x, grad_norm2 = rmsnorm_backward(grad_h, saved_norm2)
    grad_y = grad_y + grad_x  # y = x + f(x): dL/dx = dL/dy + (df/dx)^T dL/dy
    grad_h, grads_attn = attention_backward(grad_y, saved_attn)
    grad_x, grad_norm1 = rmsnorm_backward(grad_h, saved_norm1)
    norms = {"input_layernorm.weight": grad_norm1, "post_attention_layernorm.weight": grad_norm2}
    return grad_y + grad_x, norms | prefixed("self_attn", grads_attn) | prefixed("mlp", grads_mlp)


def hidden_forward(weights, scales, tokens, config):  # int [B, T] -> [B, T, D]
    angles = rotary_angles(config, tokens.shape[1])
    x, saved_embedding = embedding_forward(tokens, weights["model.embed_tokens.weight"])
    saved_blocks = []
    for i in range(config.num_hidden_layers):
        x, saved = block_forward(x, under(weights, f"model.layers.{i}"), scales, angles, config)
        saved_blocks.append(saved)
    y, saved_norm = rmsnorm_forward(x, weights["model.norm.weight"], config.rms_norm_eps)
    return y, (saved_embedding, saved_blocks, saved_norm)


def hidden_backward(grad_y, saved):
    saved_embedding, saved_blocks, saved_norm = saved
    grads = {}
    grad_x, grads["model.norm.weight"] = rmsnorm_backward(grad_y, saved_norm)
    for i, saved_block in reversed(list(enumerate(saved_blocks))):
        grad_x, grads_block = block_backward(grad_x, saved_block)
        grads |= prefixed(f"model.layers.{i}", grads_block)
    grads["model.embed_tokens.weight"] = embedding_backward(grad_x, saved_embedding)
    return grads


# --- Log-probabilities: log p(c) = z_c - log sum_v e^(z_v), one for each scored token ---


def token_logps_forward(z, targets):  # logits [N, V], int [N] -> [N]
    top = z.max(axis=1, keepdims=True)
    log_sum = top + np.log(np.sum(np.exp(z - top), axis=1, keepdims=True))  # [N, 1]
    logps = z - log_sum  # [N, V]
    return logps[np.arange(len(targets)), targets], (logps, targets)


def token_logps_backward(grad_y, saved):
    logps, targets = saved
    grad_z = -np.exp(logps)  # d log p(c) / dz_v = 1[v = c] - p(v)
    grad_z[np.arange(len(targets)), targets] += 1
    return grad_z * grad_y[:, None]


def response_forward(hidden, W, tokens, loss_mask):
    """The log-probability of each scored token, [N]: the state at t - 1 predicts token t."""
    rows, places = np.nonzero(loss_mask)  # [N], [N]
    h = hidden[rows, places - 1]  # [N, D]
    y, saved = token_logps_forward(h @ W.T, tokens[rows, places])  # W [V, D]
    return y, (hidden, W, rows, places, h, saved)


def response_backward(grad_y, saved):
    hidden, W, rows, places, h, saved = saved
    grad_z = token_logps_backward(grad_y, saved)  # [N, V]
    grad_hidden = np.zeros_like(hidden)  # what is not scored gets no gradient from the head
    grad_hidden[rows, places - 1] = grad_z @ W  # dL/dh = W^T dL/dz
    return grad_hidden, grad_z.T @ h  # dL/dW = sum_n dL/dz_n h_n^T


def model_forward(weights, scales, tokens, loss_mask, config):
    """The log-probability of each scored token, [N], row after row."""
    tied = config.tie_word_embeddings
    W = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    hidden, saved_hidden = hidden_forward(weights, scales, tokens, config)
    y, saved_response = response_forward(hidden, W, tokens, loss_mask)
    return y, (saved_hidden, saved_response, tied)


def model_backward(grad_y, saved):
    saved_hidden, saved_response, tied = saved
    grad_hidden, grad_W = response_backward(grad_y, saved_response)
    grads = hidden_backward(grad_hidden, saved_hidden)
    if tied:  # one matrix in two places: the gradients of the two add
        grads["model.embed_tokens.weight"] = grads["model.embed_tokens.weight"] + grad_W
        return grads
    return grads | {"lm_head.weight": grad_W}


def row_sums_forward(logps, loss_mask):  # [N] -> log pi(y|x) = the sum over a row's tokens, [B]
    rows = np.nonzero(loss_mask)[0]
    y = np.zeros(len(loss_mask), logps.dtype)
    np.add.at(y, rows, logps)
    return y, rows


def row_sums_backward(grad_y, rows):
    return grad_y[rows]  # each token's log-probability counts once in its row


# --- Losses, each a mean: over the scored tokens (SFT), over the pairs (the others) ---


def sft_forward(logps):  # [N] -> L = -mean log p
    return -np.mean(logps), logps


def sft_backward(logps):
    return np.full_like(logps, -1 / len(logps))  # dL/d log p_n = -1 / N


def pair_loss(delta, beta, kind="sigmoid", e=0.0):
    """l(delta) and its slope dl/d delta, both [B]; delta: the pair's difference of log-ratios."""
    if kind == "sigmoid":  # conservative DPO where e > 0: a vote is taken to be wrong with chance e
        loss = -(1 - e) * log_sigmoid(beta * delta) - e * log_sigmoid(-beta * delta)
        # d log sigmoid(u) / du = sigmoid(-u): for e = 0 the famous -beta sigmoid(-beta delta)
        slope = -(1 - e) * beta * sigmoid(-beta * delta) + e * beta * sigmoid(beta * delta)
    elif kind == "ipo":
        loss = (delta - 1 / (2 * beta)) ** 2
        slope = 2 * (delta - 1 / (2 * beta))
    else:  # hinge, max(0, 1 - beta delta)
        loss = np.maximum(0, 1 - beta * delta)
        slope = np.where(beta * delta < 1, -beta, 0.0)
    return loss, slope


def preference_forward(chosen, rejected, ref_chosen, ref_rejected, beta, kind="sigmoid", e=0.0):
    """L = mean l(delta), from log pi(y|x) of policy and reference, each [B]."""
    loss, slope = pair_loss((chosen - ref_chosen) - (rejected - ref_rejected), beta, kind, e)
    return np.mean(loss), slope


def preference_backward(slope):
    """dL/d of the four log-probabilities: policy chosen, rejected, reference chosen, rejected."""
    grad = slope / len(slope)  # dL/d log pi(y_w) = l'(delta) / B
    return grad, -grad, -grad, grad  # delta holds the middle two with a minus


# --- Central differences: the derivative that needs no derivation ---


def central_difference(f, step, levels=3):
    """f'(0), from values of f alone, with an error of order step^(2 levels).

    (f(h) - f(-h)) / 2h = f'(0) + c_2 h^2 + c_4 h^4 + ...: halving h divides the first error term by
    4, so that (4 D(h/2) - D(h)) / 3 is free of it; the next round does so with 16 (Richardson).
    """
    steps = [step / 2**level for level in range(levels)]
    estimates = [(f(h) - f(-h)) / (2 * h) for h in steps]
    for k in range(1, levels):
        pairs = zip(estimates, estimates[1:], strict=False)
        estimates = [(4**k * fine - coarse) / (4**k - 1) for coarse, fine in pairs]
    return estimates[0]
