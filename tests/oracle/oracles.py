"""What the parity tests share: one random Llama in both implementations, real files, a distance."""

import os
from pathlib import Path

import pytest
import torch

from dpo_minimal.checkpoint import load_llama
from dpo_minimal.nf4 import NF4Weight

NO_ORACLE = "the extra `oracle` is not installed: pip install '.[oracle]'"
TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large enough that every part of the network matters
    "attn_implementation": "eager",  # written out, where ours calls a fused kernel
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def transformers_llama(folder, seed=0, **changes):
    """A random float32 LlamaForCausalLM of TINY with `changes`, also saved in `folder`."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return model


def both_llamas(folder, quantize=None, **changes):
    """The same random Llama twice: transformers', and ours loaded from the folder it wrote."""
    return transformers_llama(folder, **changes), load_llama(folder, quantize=quantize)


def load_transformers(folder, **options):
    """AutoModelForCausalLM of a folder in float32; fails if a weight was missing or left over."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model


def relative_difference(ours, theirs) -> float:
    """The largest difference over the largest value of `theirs`; NaN, so no match, if all is 0."""
    theirs = theirs.detach().double()
    return ((ours.detach().double() - theirs).abs().max() / theirs.abs().max()).item()


def random_tokens(B, T, vocab_size=TINY["vocab_size"], seed=1):
    """Token ids, int64 [B, T], without the special ids 0, 1 and 2."""
    return torch.randint(3, vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def smollm2_folder() -> Path:
    """The real 135M checkpoint, or a skip with a word."""
    folder = os.environ.get("DPO_MINIMAL_SMOLLM2")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real checkpoint: DPO_MINIMAL_SMOLLM2 should name a SmolLM2-135M folder")
    return Path(folder)


def nf4_from_bitsandbytes(packed, state) -> NF4Weight:
    """The tensors of a bitsandbytes weight and its QuantState as ours."""
    common = {"packed": packed.flatten(), "shape": tuple(state.shape), "dtype": state.dtype}
    common["block_size"] = state.blocksize
    if not state.nested:
        return NF4Weight(**common, absmax=state.absmax)
    return NF4Weight(
        **common,
        absmax_codes=state.absmax,
        absmax_scale=state.state2.absmax,
        absmax_offset=state.offset,
    )
