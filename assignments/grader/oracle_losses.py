"""The second half of `oracle.py`: losses, texts to token rows, the training loop."""

import math
import re
import zlib

import numpy as np

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
    used = 0 if bug == "batches read again" else resume_at * each
    saved, places, save = [], [], s.get("save_every", 0)
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
        if save and (step + 1) % save == 0:
            saved, places = [*saved, step + 1], [*places, [0, used]]
    every = s.get("eval_every", 0)
    evaluated = [t for t in range(first, steps) if every and t % every == 0] + [steps]
    return {
        "w": w,
        "weights seen": np.array(seen),
        "steps": list(range(first, steps)),
        "evaluated at": evaluated if evaluates else [],
        "saved at": saved,
        "saved places": places,
        **{name: np.array(values) for name, values in rows.items()},
    }
