"""Prints the largest error of the Triton kernels of one token each in the interpreter, by case, relative to the largest."""

import json

import torch
from torch.nn.functional import gelu

from llmd_kernels import rms_norm, rotary, silu_mul
from llmd_kernels.quantized_kv import QuantizedKV, dequantize, half_bytes, view_quantized
from llmd_kernels.rms_norm import triton as norm_kernels
from llmd_kernels.rotary import triton as rotary_kernels
from llmd_kernels.silu_mul import triton as activation_kernels
from llmd_kernels.store_kv import reference as store_reference
from llmd_kernels.store_kv import triton as store_kernels

torch.manual_seed(0)
errors = {}


def compare(name, actual, expected):
    actual, expected = actual.double(), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan()), name
    error = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).nan_to_num(0)
    errors[name] = max(errors.get(name, 0.0), float(error))


def empty(dtype, dim, kv_heads):
    shape = (2, 5, kv_heads, dim)
    if dtype in (torch.float32, torch.float16):
        return torch.zeros(4, 3, *shape, dtype=dtype)[:, 1]
    return view_quantized(torch.zeros(4, 3, 2, half_bytes(shape), dtype=torch.uint8)[:, 1], shape, dtype)


def content(kv):
    return dequantize(*kv) if isinstance(kv, QuantizedKV) else kv


for dtype in (torch.float32, torch.float16):
    for rows, size in ((1, 1), (3, 63), (2, 1500)):
        x, residual = torch.randn(2, rows, size).to(dtype)
        weight = torch.randn(size).to(dtype)
        compare(f"rms_norm {dtype}", norm_kernels.rms_norm(x, weight, 1e-6), rms_norm.reference.rms_norm(x, weight, 1e-6))
        actual = norm_kernels.add_rms_norm(x, residual.clone(), weight, 1e-6)
        expected = rms_norm.reference.add_rms_norm(x, residual, weight, 1e-6)
        compare(f"add_rms_norm {dtype}", actual[0], expected[0])
        compare(f"residual {dtype}", actual[1], expected[1])
    heads, weight = torch.randn(3, 9 * 20).to(dtype)[:, 20:120].view(3, 5, 20), torch.randn(20).to(dtype)
    expected = rms_norm.reference.rms_norm(heads, weight, 1e-6)
    compare(f"rms_norm of heads {dtype}", norm_kernels.rms_norm(heads, weight, 1e-6), expected)
    x = (torch.randn(3, 2 * 1100) * 5).to(dtype)
    compare(f"silu {dtype}", activation_kernels.activate(x, activation_kernels.SILU), silu_mul.reference.silu_mul(x))
    gate, up = x.float().chunk(2, dim=-1)
    for kind, way in ((activation_kernels.GELU, "none"), (activation_kernels.GELU_TANH, "tanh")):
        compare(f"gelu {way} {dtype}", activation_kernels.activate(x, kind), (gelu(gate, approximate=way) * up).to(dtype))
    for dim, turned in ((20, 20), (64, 32), (80, 20)):
        qkv, table, positions = torch.randn(4, 10 * dim).to(dtype), torch.randn(50, turned), torch.tensor([3, 49, 0, 3])
        slots, norms = torch.tensor([7, 0, 19, 12]), (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype), 1e-5)

        def parts(qkv=qkv, dim=dim):
            heads = qkv.clone().view(4, 10, dim)
            return heads[:, :6], heads[:, 6:8], heads[:, 8:]

        (q, k, _), (q2, k2, _) = parts(), parts()
        rotary_kernels.rotary(q, k, positions, table)
        rotary.reference.rotary(q2, k2, positions, table)
        compare(f"rotary {dtype}", torch.cat((q, k), 1), torch.cat((q2, k2), 1))
        for kv_dtype in (dtype, torch.int8, torch.float8_e4m3fn):
            (q, k, v), mine, expected = parts(), empty(kv_dtype, dim, 2), empty(kv_dtype, dim, 2)
            if dim == 20:
                k[0, 1, 3], v[1] = float("nan"), 0.0
            store_kernels.store_kv(k, v, mine, slots)
            store_reference.store_kv(k, v, expected, slots)
            if isinstance(mine, QuantizedKV):
                torch.testing.assert_close(mine.scales, expected.scales, rtol=0, atol=0, equal_nan=True)
                assert torch.equal(mine.data.view(torch.uint8), expected.data.view(torch.uint8))
            compare(f"store {kv_dtype} {dtype}", content(mine), content(expected))
        for given in (None, norms):
            (q, k, v), (q2, k2, _) = parts(), parts()
            mine, expected = empty(dtype, dim, 2), empty(dtype, dim, 2)
            store_kernels.rotary_store_kv(q, k, v, mine, positions, slots, table, given)
            if given is not None:
                q2 = rms_norm.reference.rms_norm(q2, given[0], given[2])
                k2 = rms_norm.reference.rms_norm(k2, given[1], given[2])
            rotary.reference.rotary(q2, k2, positions, table)
            store_reference.store_kv(k2, v, expected, slots)
            compare(f"fused q {dtype}", q, q2)
            compare(f"fused kv {dtype}", mine, expected)
print(json.dumps(errors))
