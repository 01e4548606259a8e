"""The network, its gradients, its files and greedy text against transformers' LlamaForCausalLM."""

import tempfile

import pytest
import torch
import torch.nn.functional as F
from helpers import fill_adapter
from oracles import (
    NO_ORACLE,
    both_llamas,
    load_transformers,
    random_tokens,
    relative_difference,
    smollm2_folder,
)

from dpo_minimal.checkpoint import load_llama, save_llama
from dpo_minimal.data import format_prompt
from dpo_minimal.generate import generate, make_chooser, sample
from dpo_minimal.llama import inverse_frequencies
from dpo_minimal.lora import add_adapter
from dpo_minimal.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers", reason=NO_ORACLE)

# Two layers in float32 add some hundred roundings of 6e-8 each: 1e-5 leaves a factor of two or so.
CLOSE = 1e-5
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama 2": {"num_key_value_heads": 4},
    "grouped-query": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "another theta and eps": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rms_norm_eps": 1e-2,
    },
    "llama 3": {"rope_parameters": LLAMA3, "num_key_value_heads": 1},
}
every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)


def cross_entropy(logits, tokens):
    """The mean loss of predicting each next token, written out for both models alike."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def assert_gradients_agree(ours, theirs, tolerance):
    """Every parameter's gradient, by name; both models have run backward."""
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert relative_difference(parameter.grad, expected[name].grad) < tolerance, name


@every_config
def test_logits_and_all_gradients_are_those_of_transformers(tmp_path, changes):
    theirs, ours = both_llamas(tmp_path, **changes)
    tokens = random_tokens(3, 100)
    logits, expected = ours(tokens), theirs(tokens).logits
    assert relative_difference(logits, expected) < CLOSE
    cross_entropy(logits, tokens).backward()
    cross_entropy(expected, tokens).backward()
    assert_gradients_agree(ours, theirs, CLOSE)


def test_the_llama_3_case_has_kept_slowed_and_interpolated_planes(tmp_path):
    theirs, ours = both_llamas(tmp_path, **CONFIGS["llama 3"])
    found = inverse_frequencies(ours.config, torch.float32)
    assert relative_difference(found, theirs.model.rotary_emb.inv_freq) < 1e-6
    plain = 1 / 1000 ** (torch.arange(0, 16, 2) / 16)
    slowed = (plain / found).round(decimals=4)
    assert slowed.min() == 1 and slowed.max() == 8 and ((slowed > 1) & (slowed < 8)).any()


@every_config
def test_our_folder_is_one_that_transformers_loads(tmp_path, changes):
    _, ours = both_llamas(tmp_path / "theirs", **changes)
    save_llama(ours, tmp_path / "ours", dtype=torch.float32)
    again = load_transformers(tmp_path / "ours")
    tokens = random_tokens(2, 100)
    assert relative_difference(ours(tokens), again(tokens).logits) < CLOSE


def test_a_merged_folder_of_a_quantized_model_with_adapters_loads_too(tmp_path):
    _, ours = both_llamas(tmp_path / "theirs", quantize="nf4")
    tokens = random_tokens(2, 50)
    without = ours(tokens)
    for name in ("sft", "dpo"):
        add_adapter(ours, name, r=4, targets="all")
        fill_adapter(ours, name, seed=len(name), size=0.05)
    fill_adapter(ours, "dpo", seed=9, size=0.05)
    save_llama(ours, tmp_path / "merged", dtype=torch.float32)
    merged = load_transformers(tmp_path / "merged")(tokens).logits
    assert relative_difference(ours(tokens), merged) < CLOSE
    assert relative_difference(without, merged) > 0.01  # the adapters are in it


def test_right_padding_without_a_mask_is_right_padding_with_transformers_mask(tmp_path):
    theirs, ours = both_llamas(tmp_path)
    tokens, lengths = random_tokens(3, 40), torch.tensor([40, 27, 5])
    real = torch.arange(40) < lengths[:, None]  # [B, T]
    tokens[~real] = 0
    expected = theirs(tokens, attention_mask=real.long()).logits
    assert relative_difference(ours(tokens)[real], expected[real]) < CLOSE


@every_config
def test_greedy_tokens_with_our_cache_are_those_of_transformers(tmp_path, changes):
    theirs, ours = both_llamas(tmp_path, **changes)
    rows = [random_tokens(1, length, seed=length)[0].tolist() for length in (3, 17, 30)]
    found = sample(ours, rows, 40, eos_id=-1, chooser=make_chooser(0))
    for row, answer in zip(rows, found, strict=True):
        tokens = theirs.generate(
            torch.tensor([row]), do_sample=False, max_new_tokens=40, eos_token_id=-1, pad_token_id=0
        )
        assert answer == tokens[0, len(row) :].tolist()


# The real checkpoint.


def test_real_logits_and_gradients_are_those_of_transformers():
    folder = smollm2_folder()
    theirs = load_transformers(folder, attn_implementation="eager")
    ours = load_llama(folder, quantize=None)
    tokenizer = load_tokenizer(folder)
    text = format_prompt("Why is the sky blue?") + " Because air scatters blue light the most."
    tokens = torch.tensor([tokenizer.encode(text, bos=True, eos=True)])
    logits, expected = ours(tokens), theirs(tokens).logits
    # Thirty layers, and gradients that flow back through all of them, round more than two do.
    assert relative_difference(logits, expected) < CLOSE
    assert cross_entropy(logits, tokens) < 3.5  # the model can read: not just any weights
    cross_entropy(logits, tokens).backward()
    cross_entropy(expected, tokens).backward()
    assert_gradients_agree(ours, theirs, 5 * CLOSE)


@pytest.fixture(scope="module")
def merged_folder():
    """The real checkpoint in NF4 with a random adapter, merged in bfloat16; removed at the end."""
    source = smollm2_folder()
    model = load_llama(source, quantize="nf4")
    add_adapter(model, "dpo", r=4)
    fill_adapter(model, "dpo", size=0.01)
    with tempfile.TemporaryDirectory() as folder:
        save_llama(model, f"{folder}/merged", tokenizer_from=source)
        yield f"{folder}/merged"


def test_real_greedy_text_of_a_merged_folder_is_that_of_transformers(merged_folder):
    ours, tokenizer = load_llama(merged_folder, quantize=None), load_tokenizer(merged_folder)
    theirs = load_transformers(merged_folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(merged_folder)
    for question in ("Why is the sky blue?", "Write a short story about a dragon."):
        prompt = their_tokenizer(format_prompt(question), add_special_tokens=False).input_ids
        prompt = [their_tokenizer.bos_token_id, *prompt]
        tokens = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
        expected = their_tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)
        assert generate(ours, tokenizer, question, 40, temperature=0) == expected.strip()
        # An answer may be short: without an end both must go on in the same words.
        options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": -1}
        endless = theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert sample(ours, [prompt], 40, -1, make_chooser(0)) == [endless]
