"""rms_norm, silu_mul, rotary and store_kv against their references, at odd sizes."""

import pytest
import torch

from llmd_kernels import native
from llmd_kernels.quantized_kv import half_bytes, view_quantized
from llmd_kernels.rms_norm import add_rms_norm, rms_norm
from llmd_kernels.rms_norm import reference as rms_norm_reference
from llmd_kernels.rotary import reference as rotary_reference
from llmd_kernels.rotary import rotary
from llmd_kernels.silu_mul import gelu_mul, silu_mul
from llmd_kernels.silu_mul import reference as silu_mul_reference
from llmd_kernels.store_kv import reference as store_kv_reference
from llmd_kernels.store_kv import rotary_store_kv, store_kv

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed():
    if native.library() is None:
        pytest.skip("no compiler: there is only the reference")
    torch.manual_seed(0)


def close(actual, expected):
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (5, 63), (3, 896), (300, 500)])
def test_rms_norm(dtype, rows, size):
    x, residual = torch.randn(2, rows, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    close(rms_norm(x, weight, 1e-6), rms_norm_reference.rms_norm(x, weight, 1e-6))
    for actual, expected in zip(
        add_rms_norm(x, residual.clone(), weight, 1e-6),
        rms_norm_reference.add_rms_norm(x, residual, weight, 1e-6),
        strict=True,
    ):
        close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_strided_heads(dtype):
    heads = torch.randn(7, 9 * 20).to(dtype)[:, 20:120].view(7, 5, 20)
    weight = torch.randn(20).to(dtype)
    close(rms_norm(heads, weight, 1e-6), rms_norm_reference.rms_norm(heads, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (9, 77), (200, 512), (1, 40_001)])
def test_silu_mul(dtype, rows, size):
    x = (torch.randn(rows, 2 * size) * 10).to(dtype)
    close(silu_mul(x), silu_mul_reference.silu_mul(x))


def test_silu_mul_at_the_ends():
    gate = torch.tensor([0.0, -0.0, 200.0, -200.0, 1e30, -1e30, 88.0, -88.0] * 4)
    x = torch.cat((gate, torch.ones(32))).unsqueeze(0)
    close(silu_mul(x), silu_mul_reference.silu_mul(x))
    with pytest.raises(ValueError, match="silu_mul wants"):
        silu_mul(torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "turned"), [(20, 20), (64, 64), (64, 32), (80, 20), (2, 2)])
def test_rotary(dtype, dim, turned):
    qkv = torch.randn(11, 9 * dim).to(dtype)
    table, positions = torch.randn(50, turned), torch.randint(0, 50, (11,))
    actual, expected = qkv.clone(), qkv.clone()
    rotary(actual[:, : 6 * dim].view(11, 6, dim), actual[:, 6 * dim : 8 * dim].view(11, 2, dim), positions, table)
    rotary_reference.rotary(
        expected[:, : 6 * dim].view(11, 6, dim), expected[:, 6 * dim : 8 * dim].view(11, 2, dim), positions, table
    )
    close(actual, expected)
    assert torch.equal(actual[:, 8 * dim :], qkv[:, 8 * dim :])


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_store_kv(dtype, kv_dtype):
    pool = torch.full((9, 3, 2, 5, 3, 20), float("nan"), dtype=kv_dtype)
    qkv = torch.randn(17, 12 * 20).to(dtype)
    k, v = qkv[:, 120:180].view(17, 3, 20), qkv[:, 180:].view(17, 3, 20)
    slots = torch.randperm(45)[:17]
    expected = pool.clone()
    store_kv(k, v, pool[:, 1], slots)
    store_kv_reference.store_kv(k, v, expected[:, 1], slots)
    torch.testing.assert_close(pool, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1, 4])
def test_gelu_mul(dtype, tanh, spread):
    x = (torch.randn(9, 2 * 77) * spread).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    inner = 0.7978845608028654 * (gate + 0.044715 * gate**3)
    expected = gate / 2 * (1 + (torch.tanh(inner) if tanh else torch.erf(gate * 0.5**0.5))) * up
    close(gelu_mul(x, tanh=tanh), expected.to(dtype))
    with pytest.raises(ValueError, match="gelu_mul wants"):
        gelu_mul(torch.zeros(3, 5))


@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_mul_at_the_ends(tanh):
    gate = torch.tensor([0.0, -0.0, 20.0, -20.0, 1e9, -1e9, 5.0, -5.0, float("nan")] * 4)
    x = torch.cat((gate, torch.ones(36))).unsqueeze(0)
    torch.testing.assert_close(
        gelu_mul(x, tanh=tanh), silu_mul_reference.gelu_mul(x, tanh=tanh), rtol=1e-5, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "turned", "tokens"), [(64, 64, 1), (20, 16, 40), (7, 6, 3)])
def test_one_launch_is_bit_for_bit_what_the_separate_ones_are(dim, turned, tokens, dtype, normed, kv_dtype):
    shape = (2, 5, 2, dim)
    qkv = torch.randn(tokens, 10 * dim).to(dtype)
    norms = (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype), 1e-6) if normed else None
    table, positions, slots = torch.randn(50, turned), torch.randint(-3, 60, (tokens,)), torch.randperm(45)[:tokens]
    found = []
    for fused in (True, False):
        mine, raw = qkv.clone(), torch.zeros(9, 2, half_bytes(shape), dtype=torch.uint8)
        kv = torch.zeros(9, *shape, dtype=dtype) if kv_dtype is None else view_quantized(raw, shape, kv_dtype)
        q, k, v = (part.view(tokens, -1, dim) for part in mine.split((6 * dim, 2 * dim, 2 * dim), dim=-1))
        if fused:
            rotary_store_kv(q, k, v, kv, positions, slots, table, norms)
        else:
            if norms is not None:
                q.copy_(rms_norm(q, norms[0], 1e-6))
                k.copy_(rms_norm(k, norms[1], 1e-6))
            rotary(q, k, positions, table)
            store_kv(k, v, kv, slots)
        found.append((q, raw if kv_dtype is not None else kv))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].any()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_store_kv_is_norm_rotary_and_store(dtype, normed):
    qkv, pool = torch.randn(11, 10, 20).to(dtype), torch.zeros(9, 2, 5, 2, 20, dtype=dtype)
    norms = (torch.randn(20).to(dtype), torch.randn(20).to(dtype), 1e-6) if normed else None
    table, positions, slots = torch.randn(50, 16), torch.randint(0, 50, (11,)), torch.randperm(45)[:11]
    q, k = qkv[:, :6].clone(), qkv[:, 6:8].clone()
    if norms is not None:
        q, k = rms_norm_reference.rms_norm(q, norms[0], 1e-6), rms_norm_reference.rms_norm(k, norms[1], 1e-6)
    rotary_reference.rotary(q, k, positions, table)
    expected = pool.clone()
    store_kv_reference.store_kv(k, qkv[:, 8:], expected, slots)
    mine = qkv.clone()
    rotary_store_kv(mine[:, :6], mine[:, 6:8], mine[:, 8:], pool, positions, slots, table, norms)
    close(mine[:, :6], q)
    close(pool, expected)
    with pytest.raises(ValueError, match="do not fit a cache"):
        rotary_store_kv(mine[:, :6], mine[:, 6:9], mine[:, 8:], pool, positions, slots, table)
