"""The bug zoo: 32 ways in which DPO, LoRA and NF4 go wrong, each as a wrong version of our code.

Users of public implementations have reported every one of them. An entry says which function is
replaced (`right`), by what (`wrong`), how it shows (`symptom`), and which tests notice. The tests
know nothing of this file: `pytest tests/test_bugs.py -s` plants each bug in a process of its own.

    from bugs import ZOO, apply
    apply(ZOO[13])  # from here on this process has the bug: number 14, the mean for the sum
"""

import sys
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dpo_minimal.batches import pair_batch
from dpo_minimal.data import EncodedPair, encode_example, encode_pair, encode_sft, format_prompt
from dpo_minimal.formats.huggingface import load_llama
from dpo_minimal.llama import Attention, Llama, at_least_float32, rotary_table, rotate
from dpo_minimal.loop import load_state
from dpo_minimal.loop import train as train_loop
from dpo_minimal.lora import Adapter, active_adapters, merged_weight
from dpo_minimal.loss import chunk_logps, dpo_loss, preference_logps, token_logps
from dpo_minimal.nf4 import (
    NF4_CODE,
    NF4Linear,
    dequantize_absmax,
    dequantize_nf4,
    quantize_nf4,
)
from dpo_minimal.reference import batch_logps, reference_logps


class Bug(NamedTuple):
    """`wrong` in place of `right`, both functions (or both tensors), and the tests that notice."""

    number: int
    name: str
    symptom: str
    right: Any
    wrong: Any
    tests: tuple[str, ...]  # pytest's names; each fails with the bug and passes without


def apply(bug: Bug):
    """Plant a bug in this process, in every module and class of ours that has the right version.

    Modules that are imported later get it too; a test module imported before keeps the right one.
    """
    modules = [
        m for name, m in sys.modules.items() if name.split(".")[0] in ("dpo_minimal", "train")
    ]
    classes = [c for module in modules for c in vars(module).values() if isinstance(c, type)]
    found = [(p, n) for p in modules + classes for n, v in vars(p).items() if v is bug.right]
    if not found:
        raise LookupError(f"bug {bug.number}: what it replaces is not in our modules")
    for place, name in found:
        setattr(place, name, bug.wrong)


ZOO: list[Bug] = []


def bug(number: int, right, symptom: str, *tests: str):
    """Enter the decorated function into the zoo as the wrong version of `right`."""

    def enter(wrong):
        name = wrong.__name__.replace("_", " ")
        ZOO.append(Bug(number, name, symptom, right, wrong, tuple(f"tests/{t}" for t in tests)))
        return wrong

    return enter


# A wrong method that calls the right one needs it by a name that planting does not replace.
right_init, right_hidden = Adapter.__init__, Llama.hidden


# --- what is scored ---------------------------------------------------------------------------


@bug(
    1,
    token_logps,
    "Each token is scored by a state that has seen it: the loss falls to 0, the model only copies.",
    "test_loss.py::test_the_log_prob_of_three_tokens_equals_the_hand_computed_one",
    "test_loss.py::test_log_probs_equal_a_numpy_log_softmax_of_all_logits",
)
def label_shift_missing(model, tokens, loss_mask, positions=None, mask=None, sources=None):
    hidden = model.hidden(tokens, positions, mask)[loss_mask]  # not the state before each token
    return chunk_logps(hidden, model.lm_head, tokens[loss_mask])


@bug(
    2,
    pair_batch,
    "A rejected answer longer than the chosen one loses its end; behind a shorter one pads count.",
    "test_data.py::test_a_pair_is_one_row_scored_from_its_answers_to_their_eos",
)
def mask_of_chosen_used_for_rejected(pairs, indices, device):
    batch = pair_batch(pairs, indices, device)
    chosen = batch.loss_mask & ~batch.rejected
    rejected = torch.zeros_like(batch.rejected)
    for i, (prompt, chosen_answer, _) in enumerate(pairs[i] for i in indices):
        start = len(prompt) + len(chosen_answer)
        rejected[i, start : start + len(chosen_answer)] = True
    return replace(batch, loss_mask=chosen | rejected, rejected=rejected)


@bug(
    3,
    pair_batch,
    "A pair's log-probabilities depend on which longer pairs happen to be in its batch.",
    "test_evaluate.py::test_log_probs_of_pairs_are_in_the_pairs_order_whatever_the_batches_are",
    "test_data.py::test_padding_is_on_the_right_and_only_as_long_as_the_longest_row",
)
def padding_scored(pairs, indices, device):
    batch = pair_batch(pairs, indices, device)
    ends = torch.tensor([sum(map(len, pairs[i])) for i in indices], device=device)
    pads = torch.arange(batch.tokens.shape[1], device=device) >= ends[:, None]
    return replace(batch, loss_mask=batch.loss_mask | pads, rejected=batch.rejected | pads)


@bug(
    4,
    pair_batch,
    "DPO hides it, as the prompt cancels; log-probabilities are too low, and IPO is wrong.",
    "test_data.py::test_a_pair_is_one_row_scored_from_its_answers_to_their_eos",
    "test_evaluate.py::test_log_probs_of_pairs_are_in_the_pairs_order_whatever_the_batches_are",
)
def prompt_scored(pairs, indices, device):
    def whole(prompt, chosen, rejected):
        return EncodedPair(prompt[:1], prompt[1:] + chosen, prompt[1:] + rejected)

    return pair_batch([whole(*pair) for pair in pairs], indices, device)


@bug(
    5,
    encode_example,
    "The tuned model begins its answers with a BOS, a token that it never saw within a text.",
    "test_data.py::test_an_encoded_pair_is_the_template_with_one_bos_and_one_eos",
    "test_data.py::test_joint_tokens_begin_with_the_prompt_whatever_the_answer_begins_with",
)
def bos_in_front_of_the_answer(tokenizer, question, *answers):
    prompt, *answers = encode_example(tokenizer, question, *answers)
    return prompt, *([tokenizer.bos_id, *answer] for answer in answers)


@bug(
    6,
    encode_example,
    "The tuned model never stops: each sample runs on to the last token that it is allowed.",
    "test_data.py::test_an_encoded_pair_is_the_template_with_one_bos_and_one_eos",
    "test_data.py::test_joint_tokens_begin_with_the_prompt_whatever_the_answer_begins_with",
)
def eos_missing(tokenizer, question, *answers):
    prompt, *answers = encode_example(tokenizer, question, *answers)
    return prompt, *(answer[:-1] for answer in answers)


@bug(
    7,
    pair_batch,
    "The pad is the EOS and all pads are masked, the real EOS with them: the model never stops.",
    "test_data.py::test_uneven_rows_keep_the_label_of_their_eos_whatever_the_pads_are",
)
def eos_masked_as_a_pad(pairs, indices, device):
    batch = pair_batch(pairs, indices, device)
    eos = pairs[0].chosen[-1]
    return replace(batch, loss_mask=batch.loss_mask & (batch.tokens != eos))


@bug(
    8,
    encode_example,
    "The prompt's last space belongs to the answer's first word: that word is never learned.",
    "test_data.py::test_joint_tokens_begin_with_the_prompt_whatever_the_answer_begins_with",
)
def prompt_and_answer_merged(tokenizer, question, *answers):
    prompt = tokenizer.encode(format_prompt(question) + " ", bos=True)
    texts = [f"{format_prompt(question)} {answer}" for answer in answers]
    joint = [tokenizer.encode(text, bos=True, eos=True) for text in texts]
    return prompt, *(ids[len(prompt) :] for ids in joint)


@bug(
    9,
    encode_pair,
    "A long prompt leaves no answer: log-probabilities 0, a loss of 0.693 that teaches nothing.",
    "test_data.py::test_a_pair_too_long_is_dropped_and_never_cut",
    "test_data.py::test_if_everything_is_too_long_the_flag_is_named",
)
def truncation_takes_the_whole_answer(tokenizer, pair, max_length):
    prompt, chosen, rejected = encode_pair(tokenizer, pair, sys.maxsize)
    room = max(0, max_length - len(prompt))
    return EncodedPair(prompt[:max_length], chosen[:room], rejected[:room])


@bug(
    10,
    encode_sft,
    "Long answers are learned without their end: the model breaks off or does not stop.",
    "test_data.py::test_dropped_rows_are_counted_and_the_rest_keeps_its_order_and_its_ends",
)
def truncation_takes_the_eos(tokenizer, pairs, max_length, log=print):
    encoded = [encode_example(tokenizer, pair.prompt, pair.chosen) for pair in pairs]
    return [(p, answer[: max_length - len(p)]) for p, answer in encoded if len(p) < max_length]


# --- policy and reference ---------------------------------------------------------------------


@bug(
    11,
    Adapter.forward,
    "Rewards are noise at step 0 already, where policy and reference should be equal.",
    "test_lora.py::test_two_reference_passes_of_a_model_in_training_mode_are_equal",
)
def dropout_in_the_reference(self, x):
    x = F.dropout(x, self.dropout, self.training)  # on frozen adapters too
    A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
    return F.linear(F.linear(x, A), B) * self.scale


@bug(
    12,
    reference_logps,
    "At step 0 rewards are not 0 and the loss is not ln 2: they show what SFT has learned.",
    "test_train.py::test_step_0_of_dpo_is_exact_and_the_margin_moves_from_there[sigmoid]",
)
def reference_is_the_base(model, batch):
    with active_adapters(model, []):  # not ["sft"]
        return batch_logps(model, batch)


@bug(
    13,
    Adapter.forward,
    "The loss stays at 0.6931 for ever: B has no gradient, and as B is zero, A's is zero.",
    "test_loop.py::test_a_dpo_step_moves_the_margin_but_neither_the_base_nor_the_reference",
)
def adapter_frozen(self, x):
    A, B = self.lora_A.to(x.dtype), self.lora_B.data.to(x.dtype)  # .data leaves the graph
    return F.linear(F.linear(x, A), B) * self.scale


@bug(
    14,
    preference_logps,
    "Margins are small, and each token of a short answer counts more: not the loss of the paper.",
    "test_data.py::test_a_shared_prompt_gives_each_answers_own_log_probs_and_gradients",
    "test_evaluate.py::test_log_probs_of_pairs_are_in_the_pairs_order_whatever_the_batches_are",
)
def mean_instead_of_sum(model, batch):
    chosen, rejected = preference_logps(model, batch)
    lengths = (batch.loss_mask & ~batch.rejected).sum(dim=1), batch.rejected.sum(dim=1)
    return chosen / lengths[0], rejected / lengths[1]


@bug(
    15,
    reference_logps,
    "The first loss is near ln 2 but not ln 2: margins and accuracies before anything is learned.",
    "test_train.py::test_step_0_of_dpo_is_exact_and_the_margin_moves_from_there[sigmoid]",
)
def reference_takes_another_numeric_path(model, batch):
    # the policy computes in float32
    device = batch.tokens.device.type
    with active_adapters(model, ["sft"]), torch.autocast(device, torch.bfloat16):
        return batch_logps(model, batch)


@bug(
    16,
    chunk_logps,
    "Log-probabilities have 2 or 3 digits: rewards jump, the entropy drifts, then come NaNs.",
    "test_loss.py::test_bfloat16_logits_go_through_a_float32_log_softmax",
)
def log_softmax_in_16_bits(hidden, head, targets):
    logps = head(hidden).log_softmax(dim=1)
    return logps.gather(1, targets[:, None])[:, 0].float()  # too late


@bug(
    17,
    dpo_loss,
    "At beta 0.1 rewards are 10 times too small and the policy strays too far; beta 1 hides it.",
    "test_loss.py::test_the_gradient_is_minus_beta_sigmoid_of_minus_beta_delta",
    "test_loss.py::test_rewards_are_beta_times_the_log_ratios_and_carry_no_gradient",
)
def beta_twice(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, *options, **named):
    logps = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return dpo_loss(*(beta * x for x in logps), beta, *options, **named)


@bug(
    18,
    dpo_loss,
    "The loss falls, and so do the margins: training prefers the rejected answers.",
    "test_loss.py::test_loss_and_gradient_of_each_kind_equal_the_hand_computed_ones",
    "test_optimum.py::test_dpo_lands_on_the_reference_tilted_by_the_reward",
)
def pair_swapped(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *options, **named):
    swapped = (policy_rejected, policy_chosen, ref_rejected, ref_chosen)
    losses, rejected_rewards, chosen_rewards = dpo_loss(*swapped, *options, **named)
    return losses, chosen_rewards, rejected_rewards


# --- the loop, memory, 16 bits ----------------------------------------------------------------


@bug(
    19,
    train_loop,
    "Twice the --grad-accum, twice the loss and the gradient norm: the clip always bites.",
    "test_loop.py::test_the_logged_loss_is_that_of_all_micro_batches",
    "test_loop.py::test_four_batches_of_one_are_one_batch_of_four",
)
def accumulation_unscaled(model, stage, settings, folder, resume=False, asked=()):
    def collate_unscaled(rows):  # the sum of the micro-batches' means, not their mean
        batch = stage.collate(rows)
        return replace(batch, count=batch.count / settings.grad_accum)

    train_loop(model, replace(stage, collate=collate_unscaled), settings, folder, resume, asked)


@bug(
    20,
    Llama.hidden,
    "PyTorch only warns: adapters of recomputed blocks get no gradient, the last block's do.",
    "test_llama.py::test_gradient_checkpointing_over_a_frozen_base_keeps_the_adapters_gradients",
)
def checkpointing_over_frozen_inputs(self, tokens, positions=None, mask=None, cache=None):
    if cache or not self.gradient_checkpointing:
        return right_hidden(self, tokens, positions, mask, cache)
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    x = self.model.embed_tokens(tokens)
    cos, sin = rotary_table(self.config, positions, at_least_float32(x))
    *most, last = self.model.layers  # the last one's recomputation would come at once
    for block in most:
        x = checkpoint(block, x, cos, sin, mask, use_reentrant=True)  # asks x alone for gradients
    return self.model.norm(last(x, cos, sin, mask))


@bug(
    21,
    Adapter.__init__,
    "Small updates round away: at a learning rate of 1e-6 hardly any entry of an adapter moves.",
    "test_lora.py::test_adapters_of_a_bfloat16_model_are_float32_and_all_entries_move_at_1e_6",
)
def adapters_in_16_bits(self, *sizes):
    right_init(self, *sizes)
    for parameter in self.parameters():
        parameter.data = parameter.data.bfloat16()


@bug(
    22,
    load_llama,
    "All works, in four times the memory: a 7B model wants 13 GB where 4 were promised.",
    "test_checkpoint.py::test_loading_in_4_bits_equals_quantizing_the_loaded_model",
)
def base_not_quantized(folder, device="cpu", dtype=torch.float32, quantize="nf4"):
    return load_llama(folder, device, dtype, quantize=None)


@bug(
    23,
    batch_logps,
    "A resumed run, which knows its reference, draws other dropout than the run that computed it.",
    "test_loop.py::test_an_evaluation_moves_neither_the_random_state_nor_the_mode",
)
def reference_pass_moves_the_random_state(model, batch):
    order = torch.randperm(batch.count)  # whoever looks at the pairs in a random order
    return batch_logps(model, batch)[order][order.argsort()]


# --- the network ------------------------------------------------------------------------------


@bug(
    24,
    rotate,
    "A checkpoint's first words make sense, then positions blur: gibberish after some 20 tokens.",
    "test_llama.py::test_rotary_embedding_turns_halves_of_a_head_not_neighbours",
    "test_llama.py::test_logits_equal_a_numpy_llama_in_loops",
)
def rotary_planes_interleaved(x, cos, sin):
    first, second = x.to(cos.dtype)[..., 0::2], x.to(cos.dtype)[..., 1::2]  # not the two halves
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


@bug(
    25,
    Attention.forward,
    "A grouped-query checkpoint (Llama 3, SmolLM2) writes fluent nonsense; Llama 2 7B is fine.",
    "test_llama.py::test_key_value_heads_serve_neighbouring_query_heads",
    "test_llama.py::test_logits_equal_a_numpy_llama_in_loops",
)
def key_value_heads_in_the_wrong_order(self, x, cos, sin, mask=None, cache=None):
    B, T, _ = x.shape
    projections = (self.q_proj, self.k_proj, self.v_proj)
    q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in projections)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if cache is not None:
        k, v = cache.extend(k, v)
    k = k.repeat(1, self.group_size, 1, 1)  # heads 0 1 0 1, not 0 0 1 1
    v = v.repeat(1, self.group_size, 1, 1)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)
    return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


# --- 4 bits -----------------------------------------------------------------------------------


@bug(
    26,
    quantize_nf4,
    "Neighbouring weights trade places: the loss of a good checkpoint is near ln V, a blind guess.",
    "test_nf4.py::test_codes_0_to_15_pack_high_nibble_first",
    "test_nf4.py::test_gaussian_weights_have_a_relative_rms_error_of_9_2_percent",
)
def nibbles_swapped(*args, **named):
    quantized = quantize_nf4(*args, **named)
    return replace(quantized, packed=quantized.packed >> 4 | quantized.packed << 4)


ZOO.append(
    Bug(
        27,
        "code table rounded",
        "Weights agree with bitsandbytes to four digits, never to the last bit: a near miss.",
        right=NF4_CODE,
        wrong=NF4_CODE.mul(1e4).round().div(1e4),  # as one would copy it from a paper's table
        tests=("tests/test_nf4.py::test_the_16_codes_are_the_published_ones_bit_for_bit",),
    )
)


@bug(
    28,
    dequantize_absmax,
    "Weights come back near zero, half of the blocks with the wrong sign: the loss is near ln V.",
    "test_nf4.py::test_double_quantization_with_a_partial_last_block_equals_numpy",
    "test_nf4.py::test_gaussian_weights_have_a_relative_rms_error_of_9_2_percent",
)
def offset_of_double_quantization_lost(quantized):
    absmax = dequantize_absmax(quantized)
    return absmax if quantized.absmax_offset is None else absmax - quantized.absmax_offset


@bug(
    29,
    NF4Linear.forward,
    "All numbers are right, but training holds every layer in 16 bits: 13 GB more for a 7B model.",
    "test_nf4.py::test_autograd_keeps_no_dequantized_weight",
)
def autograd_keeps_the_dequantized_weight(self, x):
    return F.linear(x, dequantize_nf4(self.quantized).to(x.dtype))


@bug(
    30,
    Adapter.__init__,
    "Twice the rank is twice the step: what trained well at r = 8 diverges at r = 64.",
    "test_lora.py::test_the_update_is_alpha_over_r_times_b_a_x",
    "test_lora.py::test_an_adapter_has_its_own_rank_and_scale",
)
def alpha_not_divided_by_r(self, in_features, out_features, r, alpha, dropout):
    right_init(self, in_features, out_features, r, alpha, dropout)
    self.scale = alpha


@bug(
    31,
    merged_weight,
    "The exported model answers almost as before DPO: 4 bits are too coarse for the update.",
    "test_lora.py::test_a_merged_weight_is_the_dequantized_one_plus_the_update",
    "test_checkpoint.py::test_a_merged_folder_gives_the_logits_of_base_and_adapters",
)
def merged_into_nf4_again(layer):
    return dequantize_nf4(quantize_nf4(merged_weight(layer)))


@bug(
    32,
    load_state,
    "After a resume the curve has a step: Adam's averages start over from zero.",
    "test_checkpoint.py::test_a_state_brings_back_weights_adam_random_numbers_and_progress",
    "test_loop.py::test_killed_and_resumed_equals_uninterrupted_bit_for_bit[5-0.0]",
)
def resume_forgets_adam(path, model, optimizer, tables):
    progress = load_state(path, model, optimizer, tables)
    optimizer.state.clear()
    return progress
