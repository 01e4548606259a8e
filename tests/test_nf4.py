"""The 4-bit code, its packing, double quantization and the 4-bit linear layer."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import quantize_model, random_tokens, tiny_llama
from torch import nn

from dpo_minimal import nf4
from dpo_minimal.extras.compiled import bfloat16_bits, dequantize_fused
from dpo_minimal.nf4 import (
    DYNAMIC_CODE,
    NF4_CODE,
    NF4_VALUES,
    NF4Linear,
    NF4Weight,
    dequantize_absmax,
    dequantize_nf4,
    keep_weights,
    nearest,
    quantize_nf4,
)

same = partial(torch.testing.assert_close, rtol=0, atol=0)

# The table that bitsandbytes publishes, as the bits of its float32 values.
CODE_HEX = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)


def gaussian(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(*shape, generator=generator)).to(dtype)


def nibbles(quantized):
    """The codes of a packed weight, high nibble first, int [n]."""
    packed = quantized.packed.numpy()
    n = int(np.prod(quantized.shape))
    return np.stack((packed // 16, packed % 16), axis=1).reshape(-1)[:n]


def numpy_absmax(weight, block_size=64):
    """The largest magnitude of each block, float32 [blocks]."""
    flat = weight.float().numpy().reshape(-1)
    starts = range(0, len(flat), block_size)
    return np.array([np.abs(flat[start : start + block_size]).max() for start in starts])


def bits_per_weight(quantized):
    tensors = [value for value in vars(quantized).values() if isinstance(value, torch.Tensor)]
    return 8 * sum(t.numel() * t.element_size() for t in tensors) / np.prod(quantized.shape)


def saved_bytes(function):
    """Bytes that autograd keeps for the backward pass of function()."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(kept)


# The codes.


def test_the_16_codes_are_the_published_ones_bit_for_bit():
    assert NF4_CODE.dtype == torch.float32
    assert (
        " ".join(f"{b & 0xFFFFFFFF:08x}" for b in NF4_CODE.view(torch.int32).tolist()) == CODE_HEX
    )


def test_the_dynamic_code_has_hand_computed_values():
    # Seven decades with 1, 2, ..., 64 midpoints of both signs, 0 and 1: 2 * 127 + 2 values.
    assert len(DYNAMIC_CODE) == 256 and DYNAMIC_CODE.dtype == torch.float32
    same(DYNAMIC_CODE, DYNAMIC_CODE.sort().values)
    by_hand = {0: -0.99296875, 127: 0, 128: 0.55e-6, 129: 3.25e-6, 130: 7.75e-6, 255: 1}
    by_hand |= {254: 1 - 0.9 / 128, 191: 0.1 + 0.9 / 128, 190: 0.1 - 0.09 / 64}
    for i, value in by_hand.items():
        assert DYNAMIC_CODE[i].item() == pytest.approx(value, rel=1e-5), i


def test_codes_0_to_15_pack_high_nibble_first():
    quantized = quantize_nf4(NF4_CODE, block_size=16, double_quant=False)
    assert bytes(quantized.packed.tolist()).hex(" ") == "01 23 45 67 89 ab cd ef"
    same(dequantize_nf4(quantized), NF4_CODE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_weight_takes_the_nearest_code(dtype):
    # Through bfloat16 first, 0.44% of the nibbles of float16 weights would differ.
    weight = gaussian(64, 96, dtype=dtype)
    quantized = quantize_nf4(weight, double_quant=False)
    same(quantized.absmax, torch.from_numpy(numpy_absmax(weight)))
    scaled = weight.double().numpy().reshape(-1, 64) / numpy_absmax(weight).astype(float)[:, None]
    distances = np.abs(scaled.reshape(-1, 1) - NF4_CODE.double().numpy())  # [n, 16]
    np.testing.assert_array_equal(nibbles(quantized), distances.argmin(axis=1))


def test_halfway_between_two_codes_goes_to_the_lower_one():
    half = NF4_CODE[8].item() / 2  # halfway between codes 7 (zero) and 8, exact in float32
    weight = torch.tensor([1.0, half, half * (1 + 2**-20), -1.0])
    quantized = quantize_nf4(weight, block_size=4, double_quant=False)
    assert nibbles(quantized).tolist() == [15, 7, 8, 0]


def test_halfway_between_two_8_bit_codes_goes_to_the_lower_one_too():
    assert DYNAMIC_CODE[127] == 0
    above, below = DYNAMIC_CODE[128].item() / 2, DYNAMIC_CODE[126].item() / 2  # both exact
    values = torch.tensor([above, above * (1 + 2**-20), below, below * (1 - 2**-20)])
    assert nearest(values, DYNAMIC_CODE).tolist() == [127, 128, 126, 127]


def test_a_weight_is_multiplied_by_the_reciprocal_of_absmax_and_not_divided_by_it():
    # absmax 3, whose reciprocal in float32 is a little above 1/3. Each of the two weights is a unit
    # in the last place from where a product or a quotient would be the midpoint between two codes.
    weight = [3.0, float.fromhex("0x1.e8f0fep-4"), float.fromhex("-0x1.d4f74ep+0"), 0.0]
    quantized = quantize_nf4(torch.tensor(weight), block_size=4, double_quant=False)
    assert nibbles(quantized).tolist() == [15, 8, 1, 7]  # divided, they would be 15 7 2 7
    values = np.array(weight, np.float32)
    midpoints = (NF4_CODE[:-1] + NF4_CODE[1:]).numpy() / np.float32(2)
    divided = (values[:, None] / np.float32(3) > midpoints).sum(axis=1)
    assert divided.tolist() == [15, 7, 2, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantizing_multiplies_in_float32_and_casts_once(dtype):
    weight = gaussian(32, 64, dtype=dtype)  # a product of two bfloat16 is wrong in 20% of them
    quantized = quantize_nf4(weight, double_quant=False)
    product = NF4_CODE.numpy()[nibbles(quantized)] * np.repeat(numpy_absmax(weight), 64)
    assert product.dtype == np.float32
    back = dequantize_nf4(quantized)
    assert back.dtype == dtype
    same(back, torch.from_numpy(product).view(32, 64).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(6, 64), (3, 5), (300, 1024)])
def test_pieces_and_the_form_for_compilers_give_the_same_bits(shape, dtype, monkeypatch):
    # 300 x 1024 weights take two pieces. Eagerly run, the compiler's form is the same arithmetic.
    quantized = quantize_nf4(gaussian(*shape).to(dtype))
    in_pieces = dequantize_nf4(quantized)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(nf4, "code_pairs", None)  # not used there
    same(dequantize_nf4(quantized), in_pieces)
    codes = torch.from_numpy(nibbles(quantized)).long()
    absmax = dequantize_absmax(quantized).repeat_interleave(64)[: len(codes)]
    same(in_pieces, (NF4_CODE[codes] * absmax).to(dtype).view(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_form_for_compilers_gives_the_same_bits_for_every_byte_also_where_rounding_ties(dtype):
    packed = torch.arange(256, dtype=torch.uint8)
    # Times the code 1: halfway between two numbers of bfloat16, twice, and of float16, twice.
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11])
    absmax = torch.cat((ties, torch.tensor([1.0, 0.0, 1e-38, 60000.0]), gaussian(24).abs()))
    blocks = packed.expand(len(absmax), 256)
    weight = NF4Weight(blocks.flatten(), (len(absmax), 512), dtype, block_size=512, absmax=absmax)
    expected = dequantize_nf4(weight)
    assert expected[0, -1].item() == (1 + 2**-8 if dtype != torch.bfloat16 else 1)
    same(dequantize_fused(blocks, absmax, dtype, NF4_VALUES), expected)


def test_rounding_to_bfloat16_goes_to_the_nearest_and_ties_go_to_the_even_one():
    by_hand = {  # float32 bits: the upper 16 after rounding
        0x3F800000: 0x3F80,  # 1
        0x3F807FFF: 0x3F80,  # below the middle of 1 and 1 + 2^-7
        0x3F808000: 0x3F80,  # the middle: down to the even one
        0x3F808001: 0x3F81,
        0x3F817FFF: 0x3F81,
        0x3F818000: 0x3F82,  # a middle again: up to the even one
        0x3FFF8000: 0x4000,  # the middle below 2: up, with a carry into the exponent
        0x00008000: 0x0000,  # the smallest numbers, halfway to zero
        0x00018000: 0x0002,
        0x00000000: 0x0000,
    }
    for sign in (0, 0x8000):
        words = np.array([bits | sign << 16 for bits in by_hand], np.uint32)
        values = torch.from_numpy(words.view(np.float32))
        rounded = [bits & 0xFFFF for bits in bfloat16_bits(values).tolist()]
        found, expected = ([f"{b:04x}" for b in x] for x in (rounded, by_hand.values()))
        assert found == [f"{int(b, 16) | sign:04x}" for b in expected]


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_block_of_zeros_comes_back_as_zeros(double_quant):
    weight = gaussian(3, 64)
    weight[1] = 0
    quantized = quantize_nf4(weight, double_quant=double_quant)
    assert set(quantized.packed[32:64].tolist()) == {0x77}
    back = dequantize_nf4(quantized)
    same(back[1], torch.zeros(64))
    assert back[0].any() and back.isfinite().all()
    only_zeros = quantize_nf4(torch.zeros(2, 64), double_quant=double_quant)
    same(dequantize_nf4(only_zeros), torch.zeros(2, 64))


@pytest.mark.parametrize("double_quant", [False, True])
def test_blocks_of_numbers_too_small_for_a_reciprocal_come_back_finite(double_quant):
    # 1 / 1e-40 is infinite in float32, so that 1e38 stands in for it: 1e-40 and less count as zero.
    tiny = torch.tensor([1e-40, -1e-40, 1e-45, 0.0]).repeat(4, 16)
    back = dequantize_nf4(quantize_nf4(tiny, double_quant=double_quant))
    same(back, torch.zeros(4, 64))
    # 1e-39 * 1e38 is 0.1, and the nearest code 0.0796: the index 8.
    quantized = quantize_nf4(torch.full((4, 64), 1e-39), double_quant=double_quant)
    assert set(quantized.packed.tolist()) == {0x88}
    expected = torch.full((4, 64), 0.0795803 * 1e-39)
    # Numbers so small are 1.4e-45 apart.
    torch.testing.assert_close(dequantize_nf4(quantized), expected, rtol=0, atol=2e-45)


# Double quantization and sizes.


def test_double_quantization_with_a_partial_last_block_equals_numpy():
    weight = gaussian(257, 65)  # 262 blocks of 64: 256 share one scale, 6 the other
    quantized = quantize_nf4(weight)
    absmax = numpy_absmax(weight).astype(float)
    assert len(quantized.absmax_codes) == len(absmax) == 262 and quantized.absmax is None
    centred = absmax - absmax.mean()
    scales = np.array([np.abs(centred[:256]).max(), np.abs(centred[256:]).max()])
    np.testing.assert_allclose(quantized.absmax_scale.numpy(), scales, rtol=1e-5)
    np.testing.assert_allclose(quantized.absmax_offset.item(), absmax.mean(), rtol=1e-5)
    scaled = centred / np.repeat(scales, 256)[:262]
    code = DYNAMIC_CODE.double().numpy()
    nearest_codes = np.abs(scaled[:, None] - code).argmin(axis=1)
    np.testing.assert_array_equal(quantized.absmax_codes.numpy(), nearest_codes)
    expected = code[nearest_codes] * np.repeat(scales, 256)[:262] + absmax.mean()
    np.testing.assert_allclose(dequantize_absmax(quantized).numpy(), expected, rtol=1e-5)


def test_the_offset_of_double_quantization_is_a_float32_mean_as_torch_rounds_it():
    # 1.5 + 1.5 + (1.5 + 2^-22) is halfway between two float32 numbers and goes down to 4.5, in
    # whatever order; a third of that is 1.5. The mean in float64, rounded once, is 1.5 + 2^-23.
    absmax = torch.tensor([1.5, 1.5, 1.5 + 2**-22])
    offset = quantize_nf4(absmax[:, None].expand(3, 64)).absmax_offset
    assert offset.dtype == torch.float32 and offset.item().hex() == "0x1.8000000000000p+0"
    assert np.float32(np.mean(absmax.double().numpy())) == 1.5 + 2**-23


def test_double_quantization_moves_absmax_by_less_than_a_percent():
    weight = gaussian(512, 512)
    # Half a step of the map, 0.9 / 128, times the widest deviation from the mean of its 256.
    absmax = quantize_nf4(weight, double_quant=False).absmax
    error = dequantize_absmax(quantize_nf4(weight)) - absmax
    assert error.abs().max() <= 1.001 * 0.9 / 128 * (absmax - absmax.mean()).abs().max()
    assert 0 < (error / absmax).abs().max() < 0.01


@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 9), (1, 64), (65, 1), (5, 13, 3)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_odd_shapes_come_back_in_their_shape(shape, double_quant):
    weight = gaussian(*shape)
    quantized = quantize_nf4(weight, double_quant=double_quant)
    back = dequantize_nf4(quantized)
    assert back.shape == weight.shape and len(quantized.packed) == (weight.numel() + 1) // 2
    absmax = np.repeat(numpy_absmax(weight), 64)[: weight.numel()].reshape(shape)
    # The widest gap between two codes is 0.304, so half of it, and the error of absmax.
    np.testing.assert_array_less((back - weight).abs().numpy(), 0.17 * absmax)


def test_blocks_run_over_the_row_major_weight_also_of_a_transposed_one():
    weight = gaussian(64, 3)
    contiguous, transposed = quantize_nf4(weight.T.contiguous()), quantize_nf4(weight.T)
    same(transposed.packed, contiguous.packed)


def test_a_weight_takes_4_127_bits_and_4_5_without_double_quantization():
    weight = gaussian(1024, 1024)
    found = bits_per_weight(quantize_nf4(weight))
    assert found == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-4)
    assert bits_per_weight(quantize_nf4(weight, double_quant=False)) == 4 + 32 / 64


@pytest.mark.parametrize("double_quant", [False, True])
def test_gaussian_weights_have_a_relative_rms_error_of_9_2_percent(double_quant):
    weight = gaussian(1024, 512)
    error = dequantize_nf4(quantize_nf4(weight, double_quant=double_quant)) - weight
    assert (error.norm() / weight.norm()).item() == pytest.approx(0.092, abs=0.001)


# The linear layer.


def test_the_linear_layer_and_its_gradient_equal_numpy():
    layer = NF4Linear(quantize_nf4(gaussian(6, 10)))
    W = dequantize_nf4(layer.quantized).double().numpy()
    x = gaussian(2, 3, 10).double().requires_grad_()
    grad_y = gaussian(2, 3, 6).double()
    y = layer(x)
    y.backward(grad_y)
    np.testing.assert_allclose(y.detach().numpy(), x.detach().numpy() @ W.T, atol=1e-10)
    np.testing.assert_allclose(x.grad.numpy(), grad_y.numpy() @ W, atol=1e-10)


@pytest.mark.parametrize("block_size", [4, 16, 32, 128])
@pytest.mark.parametrize("keep", [False, True])
def test_a_layer_with_blocks_of_another_size_equals_numpy_also_after_loading_its_state(
    block_size, keep
):
    weight = gaussian(6, 10)  # 60 weights: full blocks and a partial one, or a partial one alone
    quantized = quantize_nf4(weight, block_size, double_quant=False)
    absmax = np.repeat(numpy_absmax(weight, block_size), block_size)[:60]
    W = (NF4_CODE.numpy()[nibbles(quantized)] * absmax).reshape(6, 10).astype(float)
    assert np.abs(W - weight.numpy()).max() < 0.17 * absmax.max()
    other = quantize_nf4(gaussian(6, 10, seed=1), block_size, double_quant=False)
    layer, loaded = NF4Linear(quantized), NF4Linear(other)
    loaded.load_state_dict(layer.state_dict())
    grad_y = gaussian(2, 3, 6, seed=2).double()
    for one in (layer, loaded):
        keep_weights(one, keep)
        x = gaussian(2, 3, 10).double().requires_grad_()
        y = one(x)
        y.backward(grad_y)
        np.testing.assert_allclose(y.detach().numpy(), x.detach().numpy() @ W.T, atol=1e-10)
        np.testing.assert_allclose(x.grad.numpy(), grad_y.numpy() @ W, atol=1e-10)


@pytest.mark.parametrize("block_size", [6, 64])
def test_blocks_are_the_same_however_many_weights_are_taken_at_a_time(monkeypatch, block_size):
    weight = gaussian(30, 10)
    whole = quantize_nf4(weight, block_size)
    monkeypatch.setattr(nf4, "PIECE", 128)  # 21 blocks of 6 and two weights more
    assert torch.equal(quantize_nf4(weight, block_size).packed, whole.packed)
    assert torch.equal(dequantize_nf4(quantize_nf4(weight, block_size)), dequantize_nf4(whole))


def test_the_linear_layer_answers_in_the_dtype_of_its_input():
    layer = NF4Linear(quantize_nf4(gaussian(8, 64)))
    x = gaussian(2, 64).to(torch.bfloat16).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16


def test_autograd_keeps_no_dequantized_weight():
    layer = NF4Linear(quantize_nf4(gaussian(128, 256)))
    x = gaussian(4, 256).requires_grad_()
    W = dequantize_nf4(layer.quantized)
    assert saved_bytes(lambda: F.linear(x, W)) == 4 * 128 * 256  # the count sees a plain layer's
    assert saved_bytes(lambda: layer(x)) <= 128 * 256 / 2 + 128 * 256 / 64 + 4 + 4 + 4 * 256


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")  # torch's own
def test_a_compiled_layer_keeps_no_dequantized_weight_either():
    layer = NF4Linear(quantize_nf4(gaussian(128, 256)))
    x = gaussian(4, 256).requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), x)
    torch._dynamo.reset()
    # What the compiler keeps for backward is decided before any code is generated.
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition")
    assert saved_bytes(lambda: compiled(x)) < 128 * 256  # one byte per weight; W has four
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x), expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_the_quantized_tensors_alone(dtype, double_quant):
    # absmax in bfloat16 would be wrong by up to 0.4%, silently.
    model = nn.Sequential(NF4Linear(quantize_nf4(gaussian(96, 64), double_quant=double_quant)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = model.to(dtype).state_dict()
    assert len(before) == (4 if double_quant else 2)
    for name, tensor in before.items():
        same(after[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def test_quantizing_a_model_leaves_no_linear_layer_in_floats_but_the_head():
    model = quantize_model(tiny_llama(num_hidden_layers=1))
    modules = dict(model.named_modules())
    assert [name for name, m in modules.items() if isinstance(m, nn.Linear)] == ["lm_head"]
    assert sum(isinstance(m, NF4Linear) for m in modules.values()) == 7
    for name, module in modules.items():
        if isinstance(module, NF4Linear):
            assert module.packed.dtype == module.absmax_codes.dtype == torch.uint8, name
    norms = {f"model.layers.0.{name}_layernorm" for name in ("input", "post_attention")}
    floats = {name.removesuffix(".weight") for name, _ in model.named_parameters()}
    assert floats == norms | {"model.embed_tokens", "model.norm", "lm_head"}


def test_a_quantized_model_is_the_model_of_the_dequantized_weights():
    model, tokens = tiny_llama(), random_tokens(2, 5)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data = dequantize_nf4(quantize_nf4(parameter))
    expected = model(tokens)
    actual = quantize_model(tiny_llama())(tokens)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
