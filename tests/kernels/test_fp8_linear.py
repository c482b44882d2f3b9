"""Products with e4m3 weights against their reference: scales of every shape, activations of every scheme, every byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd_kernels import native
from llmd_kernels.fp8_linear import dequantize, fp8_linear, quantize_weight, reference

BLOCKS = [None, (128, 128), (64, 32), (1, 48)]


def made(rows, width, depth, block=None, dtype=torch.float32):
    """x with strided rows, W as e4m3 with its scales, bias."""
    torch.manual_seed(0)
    weight, scale = quantize_weight(torch.randn(width, depth), block)
    return torch.randn(rows, 2 * depth).to(dtype)[:, :depth], weight, scale, torch.randn(width)


def error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(rows=st.integers(1, 70), width=st.integers(1, 140), depth=st.integers(1, 300))
@settings(max_examples=10, deadline=None)
def test_against_the_dense_product(rows, width, depth, block, dtype):
    x, weight, scale, bias = made(rows, width, depth, block, dtype)
    expected = x.float() @ dequantize(weight, scale, block).T + bias
    actual = fp8_linear(x, weight, scale, bias, block=block)
    assert actual.dtype == dtype
    assert error(actual, expected) < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("activations", ["tensor", "token", "group"])
@pytest.mark.parametrize("block", [None, (128, 128), (1, 200)])
def test_activations_become_e4m3_first(block, activations):
    x, weight, scale, bias = made(7, 33, 200, block)
    x_scale = torch.tensor(0.01) if activations == "tensor" else None
    actual = fp8_linear(x, weight, scale, bias, block=block, activations=activations, x_scale=x_scale)
    step = 128 if activations == "group" and block == (128, 128) else 200
    parts = []
    for part in torch.split(x, step, dim=1):
        s = x_scale if x_scale is not None else part.abs().amax(1, keepdim=True) / 448
        parts.append((part / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s)
    expected = torch.cat(parts, 1) @ dequantize(weight, scale, block).T + bias
    assert error(actual, expected) < 1e-5
    assert error(actual, x @ dequantize(weight, scale, block).T + bias) < 4e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_every_byte_is_what_torch_says(rows, dtype):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = every[~torch.isnan(every.float())].unsqueeze(1)
    one = torch.ones(1)
    x = torch.ones(rows, 1, dtype=dtype)
    assert torch.equal(fp8_linear(x, weight, one).float(), weight.float().T.expand(rows, -1))
    wide = weight.T.repeat(3, 3).contiguous()  # and along a row
    for place in range(0, wide.shape[1], 7):
        x = torch.zeros(rows, wide.shape[1], dtype=dtype)
        x[:, place] = 1
        assert (fp8_linear(x, wide, one).float() == wide[0, place].float()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 6])
def test_a_nan_in_the_weight_shows_in_its_output_alone(rows, dtype):
    x, weight, scale, _ = made(rows, 20, 100, dtype=dtype)
    weight.view(torch.uint8)[3, 70], weight.view(torch.uint8)[11, 99] = 0x7F, 0xFF
    bad = torch.isnan(fp8_linear(x, weight, scale))
    assert bad.all(0).nonzero().flatten().tolist() == [3, 11]
    assert not bad[:, [n for n in range(20) if n not in (3, 11)]].any()


@pytest.mark.parametrize("activations", ["float", "token", "group"])
def test_a_nan_in_a_row_stays_there(activations):
    x, weight, scale, bias = made(9, 40, 256, (128, 128), torch.bfloat16)
    x = x.clone()
    clean = fp8_linear(x, weight, scale, bias, block=(128, 128), activations=activations)
    x[4, 200] = float("nan")
    actual = fp8_linear(x, weight, scale, bias, block=(128, 128), activations=activations)
    assert torch.isnan(actual[4]).all()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(actual[others], clean[others])


@pytest.mark.parametrize("depth", [300, 1152])
@pytest.mark.parametrize("block", [None, (128, 128)])
def test_a_row_is_the_same_in_every_batch(block, depth):
    if native.library() is None:
        pytest.skip("no compiler")
    x, weight, scale, bias = made(270, 77, depth, block, torch.bfloat16)
    together = fp8_linear(x, weight, scale, bias, block=block)
    for start, end in ((7, 12), (64, 80), (200, 270)):
        assert torch.equal(fp8_linear(x[start:end], weight, scale, bias, block=block), together[start:end])
    few = fp8_linear(x[:4], weight, scale, bias, block=block)  # which are summed in another order
    for start, end in ((0, 1), (1, 4)):
        assert torch.equal(fp8_linear(x[start:end], weight, scale, bias, block=block), few[start:end])
    assert error(few, together[:4]) < 4e-3


@pytest.mark.parametrize("size", [(5, 16, 64), (6, 1, 128), (9, 100, 640), (23, 33, 1088)])
@pytest.mark.parametrize("block", [None, (1, 64), (48, 128)])
@pytest.mark.parametrize("activations", ["float", "group"])
def test_many_rows(size, block, activations):
    rows, width, depth = size
    x, weight, scale, bias = made(rows, width, depth, block, torch.bfloat16)
    x = torch.cat((x, torch.full_like(x, torch.nan)), 1)[:, :depth]  # what lies beside a row is not read
    actual = fp8_linear(x, weight, scale, bias, block=block, activations=activations)
    wide = x.float()
    if activations == "group":
        columns = depth if block is None else block[1]
        tokens, x_scale = reference.quantize(x, columns, None, -(-depth // columns))
        wide = tokens.float() * x_scale.repeat_interleave(columns, 1)[:, :depth]
    assert error(actual, wide @ dequantize(weight, scale, block).T + bias) < 5e-3


def test_scales_by_channel_may_be_a_vector_or_a_column():
    x, weight, scale, _ = made(2, 5, 16)
    assert torch.equal(fp8_linear(x, weight, scale), fp8_linear(x, weight, scale.unsqueeze(1)))


def test_weights_are_scaled_to_the_largest_value():
    weight, scale = quantize_weight(torch.tensor([[1.0, -896.0], [0.0, 0.0]]))
    assert weight.float().tolist() == [[0.5, -448.0], [0.0, 0.0]]
    assert scale[0] == 2
    assert torch.equal(reference.dequantize(weight, scale.unsqueeze(1), 1, 2), torch.tensor([[1.0, -896.0], [0.0, 0.0]]))


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(2, 15)},
        {"weight": torch.zeros(5, 16)},
        {"scale": torch.ones(4)},
        {"scale": torch.ones(2, 2), "block": (2, 8)},
        {"activations": "tensor"},
        {"x_scale": torch.tensor(1.0)},
    ],
)
def test_what_does_not_go_together_is_refused(change):
    x, weight, scale, _ = made(2, 5, 16)
    with pytest.raises(ValueError, match="fp8_linear wants"):
        fp8_linear(**{"x": x, "weight": weight, "scale": scale, **change})
