"""What the Triton kernels share: numbers of eight bits, read and written in registers as the package says.

float8 is decoded by integer arithmetic wherever the device has no instruction for it (before sm_89; gfx942, whose own float8
has another bias), so that one pool holds the same bytes everywhere. In kernels it is a byte, never a float8 pointer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmd_kernels.quantized_kv import LayerKV, QuantizedKV

PLAIN, INT8, E4M3 = 0, 1, 2  # what a cache holds
_KINDS = {torch.int8: INT8, torch.float8_e4m3fn: E4M3}


@triton.jit
def widen(x, KIND: tl.constexpr):
    """Numbers as a cache of this kind holds them, without scales, to float32."""
    value = x.to(tl.float32)
    if KIND == 2:
        size = (x & 0x7F).to(tl.int32)
        normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
        value = tl.where(x >= 128, -value, value)
    return value


@triton.jit
def nearest(x):
    """To the nearest whole number, even at halves; |x| < 2^22: a number that large has no room for a fraction."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def scale_bits(x, KIND: tl.constexpr):
    """The bits of the bfloat16 scale of a head x [D], and that scale's inverse."""
    limit: tl.constexpr = 448.0 if KIND == 2 else 127.0
    scale = tl.max(tl.abs(x), axis=0) * (1.00390625 / limit) + tl.sum(x * 0.0, axis=0)
    bits = scale.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    kept = (bits << 16).to(tl.float32, bitcast=True)
    return bits, tl.where(kept > 1e-30, 1.0 / kept, 0.0)


@triton.jit
def store_quantized(data, scales, x, d, mask, KIND: tl.constexpr):
    """A head x [D] float32, zero past its dims, as data and its scale; of a broken head only the scale tells."""
    limit: tl.constexpr = 448.0 if KIND == 2 else 127.0
    bits, inverse = scale_bits(x, KIND)
    tl.store(scales, bits.to(tl.int16))
    x = tl.minimum(tl.maximum(x * inverse, -limit), limit)
    x = tl.where(x == x, x, 0.0)
    if KIND == 2:
        code = x.to(tl.int32, bitcast=True)
        size = code & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        tiny = nearest(size.to(tl.float32, bitcast=True) * 512.0)
        small = size < 0x3C800000  # 2^-6
        tl.store(data + d, (tl.where(small, tiny, normal) | ((code >> 24) & 0x80)).to(tl.uint8), mask=mask)
    else:
        tl.store(data + d, nearest(x).to(tl.int8), mask=mask)


def kernel_view(kv: LayerKV) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Data, scales and kind as kernels take them: float8 as bytes, scales as bits; a plain cache's scales are itself."""
    if not isinstance(kv, QuantizedKV):
        return kv, kv, PLAIN
    kind = _KINDS[kv.data.dtype]
    return kv.data.view(torch.uint8) if kind == E4M3 else kv.data, kv.scales.view(torch.int16), kind
