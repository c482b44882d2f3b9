"""A KV cache in eight bits: its layout, its error, and the C++ kernel's writing bit for bit as the reference's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmd_kernels import native
from llmd_kernels.quantized_kv import LIMITS, dequantize, half_bytes, quantize, view_quantized
from llmd_kernels.store_kv import cpu, reference, store_kv

SHAPES = [(2, 5, 3, 20), (2, 16, 2, 64), (2, 1, 1, 7), (2, 3, 1, 128), (2, 16, 8, 80)]
DTYPES = list(LIMITS)


def empty(num_blocks, shape, dtype):
    raw = torch.zeros(num_blocks, 3, 2, half_bytes(shape), dtype=torch.uint8)
    return raw, view_quantized(raw[:, 1], shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_views_share_nothing(shape, dtype):
    raw, kv = empty(4, shape, dtype)
    assert kv.shape == kv.data.shape == (4, *shape)
    assert kv.scales.shape == (4, *shape[:-1])
    kv.data.view(torch.uint8).fill_(1)
    kv.scales.fill_(0)
    assert raw[:, 1].sum() == kv.data.numel()
    assert not raw[:, 0].any()
    assert not raw[:, 2].any()
    assert half_bytes(shape) % 16 == 0


def test_the_bytes_of_common_shapes():
    """What the scales and the alignment add to half of bfloat16's bytes: a thirty-second, a sixty-fourth."""
    assert half_bytes((2, 16, 2, 64)) * 2 == 2 * 16 * 2 * 64 + 2 * 16 * 2 * 2
    assert half_bytes((2, 16, 8, 128)) / (16 * 8 * 128) == 1 + 2 / 128


@settings(max_examples=60)
@given(st.sampled_from(DTYPES), st.integers(-20, 20), st.integers(1, 130), st.integers(0, 2**31))
def test_the_error_is_bounded_by_the_largest_number_of_a_head(dtype, exponent, dim, seed):
    x = torch.randn(5, 3, dim, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    data, scales = quantize(x, dtype)
    error, top = (dequantize(data, scales) - x).abs(), x.abs().amax(-1, keepdim=True)
    assert (scales.float() * LIMITS[dtype] >= top.squeeze(-1)).all()  # so that nothing saturates
    assert (error <= top * (0.51 / 127 if dtype == torch.int8 else 0.04)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_numbers_that_are_none(dtype):
    x = torch.randn(5, 2, 20)
    x[0] = 0.0
    x[1] = 1e-38
    x[2, 0, 3], x[3, 0, 3] = float("nan"), float("-inf")
    back = dequantize(*quantize(x, dtype))
    assert (back[:2] == 0).all()
    assert back[2:4, 0].isnan().all()
    assert back[2:4, 1].isfinite().all()
    assert back[4].isfinite().all()


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_writes_what_the_reference_writes(shape, dtype, kv_dtype):
    if native.library() is None:
        pytest.skip("no compiler")
    torch.manual_seed(0)
    _, block_size, heads, dim = shape
    k, v = torch.randn(2, 17, heads, 2 * dim).to(dtype)[..., :dim].contiguous()
    k *= torch.logspace(-12, 12, 17)[:, None, None].to(dtype)
    v[3] = 0
    slots = torch.randperm(20 * block_size)[:17]
    (raw, mine), (_, expected) = empty(20, shape, kv_dtype), empty(20, shape, kv_dtype)
    cpu.store_kv(k, v, mine, slots)
    reference.store_kv(k, v, expected, slots)
    assert torch.equal(mine.scales, expected.scales)
    assert torch.equal(mine.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert not raw[:, 0].any()


@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_a_broken_head_stays_broken(kv_dtype):
    """Its sequence must end with an error, not with plausible tokens."""
    k = torch.randn(3, 2, 20)
    k[0, 1, 4], k[1, 0, 7] = float("nan"), float("inf")
    _, kv = empty(2, (2, 4, 2, 20), kv_dtype)
    store_kv(k, k, kv, torch.tensor([5, 0, 2]))
    back = dequantize(kv.data, kv.scales)
    assert back[1, :, 1, 1].isnan().all()
    assert back[0, :, 0, 0].isnan().all()
    assert back.isnan().sum() == 2 * 2 * 20


def test_every_float8_is_read_and_written():
    if native.library() is None:
        pytest.skip("no compiler")
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    numbers = codes.float()
    between = torch.cat((numbers, (numbers.sort().values[1:] + numbers.sort().values[:-1]) / 2, torch.tensor([448.0])))
    scale = quantize(torch.tensor([448.0]), torch.float8_e4m3fn)[1].float()  # what a head with 448 in it is divided by
    k = (between * scale).view(-1, 1)
    k = torch.cat((k, torch.full_like(k, 448.0)), dim=-1).unsqueeze(1).contiguous()
    (_, mine), (_, expected) = (empty(len(k), (2, 1, 1, 2), torch.float8_e4m3fn) for _ in range(2))
    cpu.store_kv(k, k, mine, torch.arange(len(k)))
    reference.store_kv(k, k, expected, torch.arange(len(k)))
    assert torch.equal(mine.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert mine.data[:, 0].float().unique().numel() > 240


def test_shapes_are_checked():
    _, kv = empty(2, (2, 4, 2, 20), torch.int8)
    with pytest.raises(ValueError, match="do not fit a cache"):
        store_kv(torch.zeros(3, 2, 19), torch.zeros(3, 2, 19), kv, torch.arange(3))
