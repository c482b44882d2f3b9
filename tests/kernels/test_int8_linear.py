"""The 8-bit product against its reference, at odd sizes, and that no row feels another."""

import pytest
import torch

from llmd_kernels import native
from llmd_kernels.int8_linear import Int8Weight, dequantize, int8_linear, pack, quantize, reference, rows, unpack

SIZES = [(1, 1, 1), (1, 7, 33), (2, 66, 64), (5, 130, 896), (13, 820, 1100), (70, 65, 100), (130, 3, 200)]


def make_inputs(rows, width, depth, dtype=torch.float32):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 2 * depth).to(dtype)[:, :depth], torch.randn(width, depth), torch.randn(width)
    return x, quantize(weight), bias


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_reference(size, dtype, has_bias):
    x, weight, bias = make_inputs(*size, dtype)
    bias = bias.to(dtype) if has_bias else None
    expected = reference.int8_linear(x, unpack(weight), weight.scale, bias).float()
    actual = int8_linear(x, weight, bias)
    assert actual.dtype == dtype
    assert int8_linear(x, weight, bias, out_dtype=torch.float32).dtype == torch.float32
    # A value halfway between two steps may be rounded either way: a few elements differ by one step.
    assert (actual.float() - expected).norm() <= 3e-3 * expected.norm()


def test_channels_are_scaled_to_their_largest_weight():
    weight = quantize(torch.tensor([[1.0, -254.0, 0.0], [0.0, 0.0, 0.0], [127.0, 1.0, 2.0]]))
    assert unpack(weight).tolist() == [[0, -127, 0], [0, 0, 0], [127, 1, 2]]
    assert weight.scale[2] == 1
    assert weight.row_sums.tolist() == [-127, 0, 130]


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (15, 20), (16, 64), (300, 33)])
def test_what_is_packed_comes_back(monkeypatch, shape, is_native):
    if not is_native:
        monkeypatch.setattr(native, "library", lambda: None)
    torch.manual_seed(0)
    quantized, scale = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0]) + 0.1
    weight = pack(quantized, scale)
    assert torch.equal(unpack(weight), quantized)
    assert weight.row_sums.tolist() == quantized.sum(1).tolist()
    assert torch.equal(dequantize(weight), quantized.float() * scale.unsqueeze(1))
    copy = Int8Weight(weight.packed.clone(), *weight[1:])
    x = torch.randn(3, shape[1])
    assert torch.equal(int8_linear(x, copy), int8_linear(x, weight))


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_by_ids(monkeypatch, dtype, is_native):
    weight = quantize(torch.randn(37, 53))
    if not is_native:
        monkeypatch.setattr(native, "library", lambda: None)
    ids = torch.tensor([[0, 36, 5], [-1, 37, 16]])
    expected = dequantize(weight)[ids.clamp(0, 36)].to(dtype)
    assert torch.equal(rows(weight, ids, dtype), expected)


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="pack wants int8"):
        pack(torch.zeros(3, 4), torch.ones(3))
    with pytest.raises(ValueError, match="pack wants int8"):
        pack(torch.zeros(3, 4, dtype=torch.int8), torch.ones(4))


def test_a_row_is_the_same_in_every_batch():
    if native.library() is None:
        pytest.skip("no compiler")
    x, *weights = make_inputs(130, 277, 1200)
    together = int8_linear(x, *weights)
    for start, end in ((0, 1), (3, 5), (7, 10), (20, 27), (64, 80), (129, 130)):
        assert torch.equal(int8_linear(x[start:end], *weights), together[start:end])


def test_integers_add_up_exactly():
    if native.library() is None:
        pytest.skip("no compiler")
    quantized = torch.full((20, 2100), -127, dtype=torch.int8)
    quantized[1] = 127
    x = torch.full((9, 2100), 127.0)
    x[:, ::2] = torch.randint(-127, 128, (9, 1050)).float()
    expected = (x.double() @ quantized.double().T).float()
    assert torch.equal(int8_linear(x, pack(quantized, torch.ones(20))), expected)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_activations_stay_finite(dtype, value):
    _, *weights = make_inputs(1, 37, 53)
    assert torch.isfinite(int8_linear(torch.full((1, 53), value, dtype=dtype), *weights)).all()


def test_a_nan_is_not_swallowed():
    x, *weights = make_inputs(3, 37, 53)
    x = x.clone()
    x[1, 20] = float("nan")
    finite = torch.isfinite(int8_linear(x, *weights)).all(1)
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize("zero", [0, -17, 100, -128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_scale_and_zero_for_all_tokens(dtype, zero):
    x, weight, bias = make_inputs(5, 66, 133, dtype)
    x_scale = torch.tensor(0.02)
    q = (x.float() / x_scale + zero).round().clamp(-128, 127) - zero
    expected = q @ dequantize(weight).T * x_scale + bias
    actual = int8_linear(x, weight, bias, x_scale=x_scale, x_zero=zero)
    assert (actual.float() - expected).norm() <= 5e-3 * expected.norm()
    assert torch.equal(int8_linear(x[1:2], weight, bias, x_scale=x_scale, x_zero=zero), actual[1:2])


@pytest.mark.parametrize(("x_scale", "zero"), [(None, 3), (torch.tensor(0.1), 128)])
def test_a_zero_point_goes_with_a_scale(x_scale, zero):
    x, *weights = make_inputs(3, 37, 53)
    with pytest.raises(ValueError, match="x_zero"):
        int8_linear(x, *weights, x_scale=x_scale, x_zero=zero)


def test_shapes_are_checked():
    x, *weights = make_inputs(3, 37, 53)
    with pytest.raises(ValueError, match="int8_linear wants"):
        int8_linear(x[:, :50], *weights)
