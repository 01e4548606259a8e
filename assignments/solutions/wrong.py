"""Plausible wrong solutions: the reference with a line or two changed, as students would.

Each names the bug that the grader must recognize (or "" where a rung's own words must do) and the
rungs that it must lose: those and no others. The zoo in tests/bugs.py has many of the same ones.
"""

from typing import NamedTuple


class Wrong(NamedTuple):
    """`old` becomes `new` in one function of the reference solution."""

    problem: str
    bug: str
    function: str
    old: str
    new: str
    loses: str  # rungs with commas between, "all", or "all but" some
    also: tuple[str, str, str] = ("", "", "")  # a second change: function, old, new


NORM, ROTATE, ATTEND = "RMSNorm.forward", "rotate", "Attention.forward"
MEAN = "wide.square().mean(-1, keepdim=True) + self.eps"

NETWORK = [
    Wrong("rmsnorm", "mean taken off", NORM, "wide = wide *", "wide = wide - wide.mean(-1, True)\n        wide = wide *", "hand value, invariant, gradient, float64, 16 bits"),
    Wrong("rmsnorm", "eps outside the root", NORM, f"torch.rsqrt({MEAN})", "(1 / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps))", "float64"),
    Wrong("rmsnorm", "no root", NORM, "torch.rsqrt", "torch.reciprocal", "hand value, invariant, gradient, float64, 16 bits"),
    Wrong("rmsnorm", "sum, not mean", NORM, ".mean(-1", ".sum(-1", "hand value, invariant, gradient, float64, 16 bits"),
    Wrong("rmsnorm", "weight left out", NORM, "self.weight * ", "", "hand value, invariant, gradient, float64, 16 bits"),
    Wrong("rmsnorm", "over tokens", NORM, ".mean(-1", ".mean(-2", "hand value, invariant, gradient, float64, 16 bits"),
    Wrong("rmsnorm", "eps left out", NORM, " + self.eps", "", "float64"),
    Wrong("rmsnorm", "", NORM, "wide = x.to(at_least_float32(x))", "wide = x", "16 bits"),
    Wrong("rmsnorm", "", NORM, "wide = x.to(at_least_float32(x))", "wide = x.float()", "float64"),
    Wrong("rmsnorm", "", NORM, "wide = x.to(at_least_float32(x))", "wide = x.detach().to(at_least_float32(x))", "gradient"),
    Wrong("rotary", "other layout", ROTATE, "x.to(cos.dtype).chunk(2, dim=-1)", "x.to(cos.dtype)[..., 0::2], x.to(cos.dtype)[..., 1::2]", "invariant, gradient, float64, 16 bits", (ROTATE, "torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)", "torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)")),
    Wrong("rotary", "neighbours in, halves out", ROTATE, "x.to(cos.dtype).chunk(2, dim=-1)", "x.to(cos.dtype)[..., 0::2], x.to(cos.dtype)[..., 1::2]", "invariant, gradient, float64, 16 bits"),
    Wrong("rotary", "turned backwards", ROTATE, "first * cos - second * sin, second * cos + first * sin", "first * cos + second * sin, second * cos - first * sin", "all but shape"),
    Wrong("rotary", "cos and sin swapped", "rotary_table", "angles.cos(), angles.sin()", "angles.sin(), angles.cos()", "all but shape"),
    Wrong("rotary", "a sign in the second half", ROTATE, "second * cos + first * sin", "second * cos - first * sin", "all but shape"),
    Wrong("rotary", "counted in the row", "rotary_table", "positions[:, None, :, None]", "torch.arange(positions.shape[1]).expand_as(positions)[:, None, :, None]", "hand value, gradient, float64, 16 bits"),
    Wrong("rotary", "positions of the first row", "rotary_table", "positions[:, None, :, None]", "positions[:1].expand_as(positions)[:, None, :, None]", "float64"),
    Wrong("rotary", "", "rotary_table", "angles.cos(), angles.sin()", "angles.half().float().cos(), angles.half().float().sin()", "hand value, invariant, gradient, float64, 16 bits"),
    Wrong("rotary", "", ROTATE, ".to(x.dtype)\n", "\n", "16 bits"),
    Wrong("attention", "not causal", ATTEND, ".tril(k.shape[2] - T)", "", "hand value, invariant, groups, gradient, cache, float64"),
    Wrong("attention", "masked after the softmax", ATTEND, 'float("-inf")', "0.0", "all but shape"),
    Wrong("attention", "not scaled", ATTEND, " / self.head_dim**0.5", "", "all but shape"),
    Wrong("attention", "divided by K", ATTEND, "self.head_dim**0.5", "self.head_dim", "all but shape"),
    Wrong("attention", "heads in the wrong order", ATTEND, "repeat_interleave(self.group_size, dim=1)", "repeat(1, self.group_size, 1, 1)", "groups, cache"),
    Wrong("attention", "v rotated", ATTEND, "q, k = rotate(q, cos, sin), rotate(k, cos, sin)", "q, k, v = rotate(q, cos, sin), rotate(k, cos, sin), rotate(v, cos, sin)", "all but shape"),
    Wrong("attention", "k not rotated", ATTEND, "q, k = rotate(q, cos, sin), rotate(k, cos, sin)", "q = rotate(q, cos, sin)", "all but shape"),
    Wrong("attention", "mask ignored", ATTEND, "if mask is None:", "if True:", "mask"),
    Wrong("attention", "heads not put side by side", ATTEND, "y.transpose(1, 2).reshape", "y.reshape", "all but shape, hand value"),
    Wrong("attention", "", ATTEND, ".tril(k.shape[2] - T)", ".tril()", "cache"),
    Wrong("attention", "", ATTEND, 'cache["k"], cache["v"] = k, v', "pass", "cache"),
    Wrong("attention", "", ATTEND, ".softmax(dim=-1)", ".float().softmax(dim=-1).to(v.dtype)", "float64"),
]

CODE, QUANTIZE = "nf4_code", "quantize_nf4"
BITS = [
    Wrong(CODE, "sides swapped", CODE, "outermost, 0.5, 9)[:-1].tolist()\n    below = linspace32(outermost, 0.5, 8)", "outermost, 0.5, 8)[:-1].tolist()\n    below = linspace32(outermost, 0.5, 9)", "all"),
    Wrong(CODE, "not divided", CODE, "code / code.max()", "code", "all"),
    Wrong(CODE, "spaced in float64", CODE, "linspace32(", "(lambda *ends: torch.linspace(*ends, dtype=torch.float64))(", "every bit"),
    Wrong(CODE, "evenly spaced", CODE, "code / code.max()", "torch.linspace(-1, 1, 16)", "all"),
    Wrong(CODE, "rounded to four digits", CODE, "code / code.max()", "(code / code.max()).mul(1e4).round().div(1e4)", "every bit"),
    Wrong(CODE, "descending", CODE, "sorted(values)", "sorted(values)[::-1]", "all"),
    Wrong("quantize", "low nibble first", QUANTIZE, "codes[0::2] << 4 | codes[1::2]", "codes[1::2] << 4 | codes[0::2]", "all but shape"),
    Wrong("quantize", "largest, not largest magnitude", "scaled_blocks", "blocks.abs().amax", "blocks.amax", "hand value, blocks, odd sizes, zeros, double quantization"),
    Wrong("quantize", "one absmax for all", "scaled_blocks", "blocks.abs().amax(dim=1)", "blocks.abs().amax().expand(len(blocks))", "blocks, odd sizes, zeros, double quantization"),
    Wrong("quantize", "columns first", QUANTIZE, "weight.detach().to(torch.float32).flatten()", "weight.detach().to(torch.float32).T.flatten()", "all but shape, hand value"),
    Wrong("quantize", "ties go up", "nearest", "out_int32=True", "out_int32=True, right=True", "ties"),
    Wrong("quantize", "offset left out", QUANTIZE, "absmax.mean()", "absmax.mean() * 0", "double quantization"),
    Wrong("quantize", "the next lower code", "nearest", "torch.bucketize(values, midpoints, out_int32=True)", "(torch.bucketize(values, code, right=True) - 1).clamp(min=0)", "all but shape"),
    Wrong("quantize", "", "scaled_blocks", "absmax.clamp(min=1e-38)", "absmax", "zeros"),
    Wrong("dequantize", "low nibble first", "dequantize_nf4", "(quantized.packed >> 4, quantized.packed & 15)", "(quantized.packed & 15, quantized.packed >> 4)", "all but shape"),
    Wrong("dequantize", "absmax left out", "dequantize_nf4", "values = values * absmax", "values = values", "all but shape"),
    Wrong("dequantize", "offset left out", "dequantize_absmax", " + quantized.absmax_offset", "", "double quantization"),
    Wrong("dequantize", "one scale for all", "dequantize_absmax", "quantized.absmax_scale.repeat_interleave(ABSMAX_BLOCK)", "quantized.absmax_scale[:1].repeat(len(codes))", "double quantization"),
    Wrong("dequantize", "blocks of 64 for absmax too", "dequantize_absmax", "repeat_interleave(ABSMAX_BLOCK)[: len(codes)]", "repeat_interleave(64)[torch.arange(len(codes)).clamp(max=127)]", "double quantization"),
    Wrong("dequantize", "neighbours share no block", "dequantize_nf4", "absmax.repeat_interleave(quantized.block_size)", "absmax.repeat(quantized.block_size)", "all but shape, hand value"),
    Wrong("dequantize", "", "dequantize_nf4", "values = values * absmax", "values = values.to(quantized.dtype) * absmax.to(quantized.dtype)", "16 bits"),
]

FORWARD, BACKWARD = "NF4Matmul.forward", "NF4Matmul.backward"
AGAIN = "grad_y @ dequantize_nf4(ctx.quantized).to(grad_y.dtype)"
MATMUL = [
    Wrong("nf4_backward", "backward transposed", BACKWARD, AGAIN, "grad_y @ dequantize_nf4(ctx.quantized).to(grad_y.dtype).T", "gradient, more axes, memory, 16 bits"),
    Wrong("nf4_backward", "forward transposed", FORWARD, "dequantize_nf4(quantized).to(x.dtype)", "dequantize_nf4(quantized).to(x.dtype).T", "shape, hand value, more axes, memory, 16 bits"),
    Wrong("nf4_backward", "no gradient", BACKWARD, AGAIN, f"0 * ({AGAIN})", "gradient, more axes, memory, 16 bits"),
    Wrong("nf4_backward", "twice the gradient", BACKWARD, AGAIN, f"2 * ({AGAIN})", "gradient, more axes, memory, 16 bits"),
    Wrong("nf4_backward", "W kept aside", BACKWARD, "dequantize_nf4(ctx.quantized)", "ctx.weight", "memory", (FORWARD, "return F.linear(x, dequantize_nf4(quantized).to(x.dtype))", "ctx.weight = dequantize_nf4(quantized)\n        return F.linear(x, ctx.weight.to(x.dtype))")),
    Wrong("nf4_backward", "", FORWARD, "dequantize_nf4(quantized).to(x.dtype)", "dequantize_nf4(quantized).to(torch.float32)", "16 bits"),
]

A_PARAMETER = "nn.Parameter(torch.empty(r, in_features).uniform_(-bound, bound))"
ACTIVE = "for name in self.active:\n            y = y + self.adapters[name](x)"
ADAPTERS = [
    Wrong("lora", "alpha alone", "Adapter.__init__", "alpha / r", "alpha", "all but shape, start"),
    Wrong("lora", "other scale", "Adapter.__init__", "alpha / r", "alpha / r**0.5", "all but shape, start"),
    Wrong("lora", "no scale", "Adapter.forward", " * self.scale", "", "all but shape, start"),
    Wrong("lora", "only the last", "LoRALinear.forward", ACTIVE, "for name in self.active:\n            y = self.base(x) + self.adapters[name](x)", "several adapters, gradient, frozen"),
    Wrong("lora", "inactive ones act", "LoRALinear.forward", "self.active", "self.adapters", "several adapters"),
    Wrong("lora", "base left out", "LoRALinear.forward", "y = self.base(x)", "y = 0", "all but shape, start"),
    Wrong("lora", "A starts too large", "Adapter.__init__", "uniform_(-bound, bound)", "uniform_(-1, 1)", "start"),
    Wrong("lora", "no dropout", "Adapter.forward", "F.dropout(x, self.dropout)", "x", "start"),
    Wrong("lora", "dropout in evaluation", "Adapter.forward", "self.training and self.lora_A.requires_grad", "self.lora_A.requires_grad", "start"),
    Wrong("lora", "", "Adapter.forward", "self.training and self.lora_A.requires_grad", "self.training", "frozen"),
    Wrong("lora", "", "Adapter.forward", "self.lora_B.to(x.dtype)", "self.lora_B.data.to(x.dtype)", "gradient"),
    Wrong("merge", "inactive ones too", "merged_weight", 'getattr(layer, "active", ())', 'getattr(layer, "adapters", ())', "several adapters"),
    Wrong("merge", "update lost", "merged_weight", "return weight", "from dpo_minimal.nf4 import quantize_nf4\n    return dequantize_nf4(quantize_nf4(weight)) if isinstance(base, NF4Linear) else weight", "4 bits"),
    Wrong("merge", "scale left out", "Adapter.delta", "self.scale * ", "", "all but shape"),
    Wrong("merge", "scale twice", "merged_weight", "layer.adapters[name].delta()", "layer.adapters[name].scale * layer.adapters[name].delta()", "all but shape"),
    Wrong("merge", "only the first", "merged_weight", 'getattr(layer, "active", ())', 'getattr(layer, "active", ())[:1]', "several adapters, 4 bits"),
    Wrong("merge", "transposed", "Adapter.delta", "(self.lora_B @ self.lora_A)", "((self.lora_B @ self.lora_A).T if len(self.lora_B) == self.lora_A.shape[1] else self.lora_B @ self.lora_A)", "hand value"),
    Wrong("merge", "not detached", "merged_weight", ".delta().detach()", ".delta()", "all"),
    Wrong("merge", "16-bit sum", "merged_weight", "return weight", "return weight.to(base.weight.dtype).float() if hasattr(base, 'weight') else weight", "16 bits"),
]

TOKEN = "token_logps"
SUM = "grid.sum(dim=1)"
LOSSES = [
    Wrong("response_logps", "not shifted", TOKEN, "places - 1", "places", "all but shape, sources"),
    Wrong("response_logps", "shifted twice", TOKEN, "places - 1", "(places - 2).clamp(min=0)", "all but shape, sources"),
    Wrong("response_logps", "mean, not sum", "sequence_logps", SUM, "grid.sum(dim=1) / loss_mask.sum(dim=1)", "all but shape, sources"),
    Wrong("response_logps", "logits, not log-probabilities", "chunk_logps", " - logits.logsumexp(dim=1)", "", "all but shape"),
    Wrong("response_logps", "sign", "sequence_logps", SUM, "-grid.sum(dim=1)", "all but shape, sources"),
    Wrong("response_logps", "mask inverted", "sequence_logps", "logps = token_logps", "loss_mask = ~loss_mask\n    loss_mask[:, 0] = False\n    logps = token_logps", "all but shape, sources"),
    Wrong("response_logps", "all scored", "sequence_logps", "logps = token_logps", "loss_mask = torch.ones_like(loss_mask)\n    loss_mask[:, 0] = False\n    logps = token_logps", "invariant, gradient, chunks, float64, 16 bits"),
    Wrong("response_logps", "sources ignored", TOKEN, "places - 1 if sources is None else sources[rows, places]", "places - 1", "sources"),
    Wrong("response_logps", "", "chunk_logps", "logits.to(at_least_float32(logits))", "logits", "16 bits"),
    Wrong("response_logps", "", "sequence_logps", SUM, "grid.detach().sum(dim=1).requires_grad_()", "gradient"),
    Wrong("dpo_loss", "pair swapped", "dpo_loss", "delta = chosen_logratios - rejected_logratios", "chosen_logratios, rejected_logratios = rejected_logratios, chosen_logratios\n    delta = chosen_logratios - rejected_logratios", "all but shape, step 0, options"),
    Wrong("dpo_loss", "reference left out", "dpo_loss", "policy_chosen_logps - ref_chosen_logps\n    rejected_logratios = policy_rejected_logps - ref_rejected_logps", "policy_chosen_logps\n    rejected_logratios = policy_rejected_logps", "all but shape, options"),
    Wrong("dpo_loss", "beta twice", "dpo_loss", 'if kind == "sigmoid":', 'delta = delta if kind == "ipo" else beta * delta\n    if kind == "sigmoid":', "hand value, gradient, hinge, smoothing, far out"),
    Wrong("dpo_loss", "rewards without beta", "dpo_loss", "beta * chosen_logratios.detach(), beta * rejected", "chosen_logratios.detach(), rejected", "rewards"),
    Wrong("dpo_loss", "rewards not detached", "dpo_loss", "chosen_logratios.detach()", "chosen_logratios", "rewards"),
    Wrong("dpo_loss", "sign", "dpo_loss", 'if kind == "sigmoid":', 'label_smoothing = 1 - label_smoothing\n    if kind == "sigmoid":', "hand value, gradient, smoothing, far out"),
    Wrong("dpo_loss", "sign", "dpo_loss", "delta = chosen_logratios - rejected_logratios", "delta = rejected_logratios - chosen_logratios", "hand value, gradient, ipo, hinge, smoothing, far out"),
    Wrong("dpo_loss", "1 / beta for 1 / (2 beta)", "dpo_loss", "1 / (2 * beta)", "1 / beta", "ipo"),
    Wrong("dpo_loss", "", "dpo_loss", "F.logsigmoid(beta * delta)", "torch.log(torch.sigmoid(beta * delta))", "far out"),
    Wrong("dpo_loss", "", "dpo_loss", "raise ValueError", "raise KeyError", "options"),
]

HAND = [
    Wrong("dpo_gradient", "not averaged", "dpo_gradient", " / len(h)", "", "gradient, far out"),
    Wrong("dpo_gradient", "same sign for both", "dpo_gradient", "slope, -slope", "slope, slope", "hand value, gradient, far out"),
    Wrong("dpo_gradient", "sign", "dpo_gradient", "slope, -slope", "-slope, slope", "hand value, gradient, far out"),
    Wrong("dpo_gradient", "beta left out", "dpo_gradient", "slope = -beta * ", "slope = -1.0 * ", "hand value, gradient, far out"),
    Wrong("dpo_gradient", "reference left out", "dpo_gradient", "(pc - rc) - (pr - rr)", "pc - pr", "hand value, gradient, far out"),
    Wrong("dpo_gradient", "sigmoid of plus delta", "dpo_gradient", "np.exp(np.minimum(h, 700))", "np.exp(np.minimum(-h, 700))", "hand value, gradient, far out"),
    Wrong("dpo_gradient", "sign", "logps_gradient", "return gradient", "return -gradient", "logits, large logits"),
    Wrong("dpo_gradient", "softmax left out", "logps_gradient", "gradient = -p", "gradient = 0 * p", "logits, large logits"),
    Wrong("dpo_gradient", "divided by N", "logps_gradient", "return gradient", "return gradient / len(targets)", "logits, large logits"),
    Wrong("dpo_gradient", "", "logps_gradient", "logits - logits.max(axis=1, keepdims=True)", "logits", "large logits"),
]

ENCODE, ROWS, LOOP = "encode_example", "answer_rows", "train"
TEXTS = [
    Wrong("tokenization", "space with the prompt", ENCODE, "tokenizer.encode(format_prompt(question), bos=True)", "tokenizer.encode(format_prompt(question) + ' ', bos=True)", "hand value, odd answers, fits, too long"),
    Wrong("tokenization", "merge not noticed", ENCODE, "joint[: len(prompt)] != prompt", "False", "merging"),
    Wrong("tokenization", "EOS left out", ENCODE, "bos=True, eos=True", "bos=True", "hand value, odd answers, fits, too long"),
    Wrong("tokenization", "BOS before the answer", ENCODE, "return prompt, ", "return prompt, [tokenizer.bos_id] + ", "hand value, odd answers, fits"),
    Wrong("tokenization", "no BOS", ENCODE, "return prompt, ", "return prompt[1:], ", "hand value, odd answers, fits, too long"),
    Wrong("tokenization", "tokenized apart", ENCODE, "joint[len(prompt) :]\n", "tokenizer.encode(answer, eos=True)\n", "hand value, odd answers, fits"),
    Wrong("tokenization", "cut", "encode_pair", "if fits else None", "if fits else EncodedPair(prompt, chosen[: max_length - len(prompt)], rejected[: max_length - len(prompt)])", "too long"),
    Wrong("tokenization", "only chosen measured", "encode_pair", "max(len(chosen), len(rejected))", "len(chosen)", "too long"),
    Wrong("tokenization", "one short", "encode_pair", "<= max_length", "< max_length", "fits"),
    Wrong("tokenization", "prompt scored", ROWS, "[False] * len(prompt)", "[False] + [True] * (len(prompt) - 1)", "rows, one row"),
    Wrong("tokenization", "EOS not scored", ROWS, "[True] * len(answer)", "[True] * (len(answer) - 1) + [False]", "rows, one row"),
    Wrong("tokenization", "pads scored", ROWS, "pad(masks, False", "pad(masks, True", "rows"),
    Wrong("training", "mean of means", LOOP, "(losses.sum() / count).backward()", "(losses.mean() / settings.grad_accum).backward()", "accumulation"),
    Wrong("training", "micro-batches summed", LOOP, "(losses.sum() / count).backward()", "losses.mean().backward()", "accumulation"),
    Wrong("training", "gradients not cleared", LOOP, "optimizer.zero_grad(set_to_none=True)", "pass", "several steps, accumulation, clipping, schedule and decay, resume"),
    Wrong("training", "not clipped", LOOP, "settings.max_grad_norm)", "float('inf'))", "clipping"),
    Wrong("training", "constant rate", LOOP, "learning_rate(step, steps, settings)", "settings.learning_rate", "several steps, accumulation, clipping, schedule and decay, resume"),
    Wrong("training", "no weight decay", LOOP, "weight_decay=settings.weight_decay", "weight_decay=0", "schedule and decay"),
    Wrong("training", "Adam with L2", LOOP, "torch.optim.AdamW", "torch.optim.Adam", "schedule and decay"),
    Wrong("training", "batches read again", LOOP, "first_step * settings.grad_accum, None", "0, None", "resume"),
    Wrong("training", "starts again from step 0", LOOP, 'progress["step"], progress["num_tokens"]', '0, progress["num_tokens"]', "resume"),
    Wrong("training", "last micro-batch logged", LOOP, "sums[name] += values.detach().sum()", "sums[name] = values.detach().mean() * count", "accumulation"),
    Wrong("training", "", LOOP, "settings.eval_every and step % settings.eval_every == 0", "settings.eval_every and (step + 1) % settings.eval_every == 0", "evaluation"),
]

WRONG = [*NETWORK, *BITS, *MATMUL, *ADAPTERS, *LOSSES, *HAND, *TEXTS]
