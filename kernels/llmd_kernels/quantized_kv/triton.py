"""What the Triton kernels share: numbers of eight bits, read and written in registers as the package says.

float8 is decoded by integer arithmetic wherever the device has no instruction for it (before sm_89; gfx942, whose own float8
has another bias), so that one pool holds the same bytes everywhere. In kernels it is a byte, never a float8 pointer.

Numbers are read one by one, or by CUDA devices four in a word: LLVM takes bytes apart and puts halves together one at a
time, which costs three times the instructions that a device has for each byte of its memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llmd_kernels.quantized_kv import LayerKV, QuantizedKV

PLAIN, INT8, E4M3 = 0, 1, 2  # what a cache holds
ONE_BY_ONE, WORDS, WORDS_CONVERTED = 0, 1, 2  # how it is read; the last with the device's instruction for float8
_KINDS = {torch.int8: INT8, torch.float8_e4m3fn: E4M3}
_CONVERTS = 89  # sm_ of the first device that does

# PTX: a word of four numbers into four of float16, exactly. A byte of int8, its sign flipped, below 0x64 is 1152 too much.
INT8_WORD = tl.constexpr("""{
.reg .b32 word, low, high, excess;
mov.b32 excess, 0xe480e480;
xor.b32 word, $4, 0x80808080;
prmt.b32 low, word, 0x64646464, 0x4140;
prmt.b32 high, word, 0x64646464, 0x4342;
add.f16x2 low, low, excess;
add.f16x2 high, high, excess;
mov.b32 {$0, $1}, low;
mov.b32 {$2, $3}, high;
}""")
# The bits of an e4m3 below those of a float16's sign are 2^-8 of the number.
E4M3_WORD = tl.constexpr("""{
.reg .b32 low, high, size, factor, nothing;
mov.b32 factor, 0x5c005c00;
mov.b32 nothing, 0x80008000;
prmt.b32 low, $4, 0, 0x1404;
prmt.b32 high, $4, 0, 0x3424;
shr.b32 size, low, 1;
and.b32 size, size, 0x3f803f80;
lop3.b32 low, low, 0x80008000, size, 0xea;
shr.b32 size, high, 1;
and.b32 size, size, 0x3f803f80;
lop3.b32 high, high, 0x80008000, size, 0xea;
fma.rn.f16x2 low, low, factor, nothing;
fma.rn.f16x2 high, high, factor, nothing;
mov.b32 {$0, $1}, low;
mov.b32 {$2, $3}, high;
}""")
E4M3_WORD_CONVERTED = tl.constexpr("""{
.reg .b32 low, high;
.reg .b16 first, second;
mov.b32 {first, second}, $4;
cvt.rn.f16x2.e4m3x2 low, first;
cvt.rn.f16x2.e4m3x2 high, second;
mov.b32 {$0, $1}, low;
mov.b32 {$2, $3}, high;
}""")


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
def four_of(word, PTX: tl.constexpr):
    """Words [N, W] to their numbers [N, 4·W] in float16."""
    a, b, c, d = tl.inline_asm_elementwise(
        PTX, "=h,=h,=h,=h,r", [word], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1
    )
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (word.shape[0], 4 * word.shape[1]))


@triton.jit
def numbers(x, dtype: tl.constexpr, KIND: tl.constexpr, READ: tl.constexpr):
    """What was loaded of a cache, without scales, in the dtype of products; words are always float16's."""
    if KIND == 0:
        values = x.to(dtype)
    elif READ == 0:
        values = widen(x, KIND).to(dtype)
    elif KIND == 1:
        values = four_of(x, INT8_WORD)
    elif READ == 1:
        values = four_of(x, E4M3_WORD)
    else:
        values = four_of(x, E4M3_WORD_CONVERTED)
    return values


@triton.jit
def scale_at(scales, at, READ: tl.constexpr):
    """The float32 of bfloat16 scales; words hold two, the even one below: asynchronous loads are of at least 32 bits."""
    if READ == 0:  # noqa: SIM108 - two lines that fit
        bits = tl.load(scales + at).to(tl.int32) << 16
    else:
        bits = (tl.load(scales + (at >> 1)) >> ((at & 1) << 4)) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def nearest(x):
    """To the nearest whole number, even at halves; |x| < 2^22: a number that large has no room for a fraction."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def scale_bits(largest, broken, KIND: tl.constexpr):
    """The bits of the bfloat16 scales of heads [H], from their largest numbers, and the scales' inverses.

    `broken` is 0, or NaN for heads that hold a NaN or an infinity: their scale tells, maxima do not.
    """
    limit: tl.constexpr = 448.0 if KIND == 2 else 127.0
    bits = (largest * (1.00390625 / limit) + broken).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    kept = (bits << 16).to(tl.float32, bitcast=True)
    return bits, tl.where(kept > 1e-30, 1.0 / kept, 0.0)


@triton.jit
def eight_bits(x, inverse, KIND: tl.constexpr):
    """Heads x [H, D] float32 as data, by their scales' inverses [H]; nothing of a broken head."""
    limit: tl.constexpr = 448.0 if KIND == 2 else 127.0
    x = tl.minimum(tl.maximum(x * inverse[:, None], -limit), limit)
    x = tl.where(x == x, x, 0.0)
    if KIND == 2:
        code = x.to(tl.int32, bitcast=True)
        size = code & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        tiny = nearest(size.to(tl.float32, bitcast=True) * 512.0)
        data = (tl.where(size < 0x3C800000, tiny, normal) | ((code >> 24) & 0x80)).to(tl.uint8)  # below 2^-6
    else:
        data = nearest(x).to(tl.int8)
    return data


class KernelView(NamedTuple):
    """A cache as kernels take it."""

    data: torch.Tensor  # float8 as bytes, or four numbers in an int32
    scales: torch.Tensor  # their bits, one in an int16 or two in an int32; the data itself for a plain cache
    kind: int
    read: int


def kernel_view(kv: LayerKV, sm: int | None = None) -> KernelView:
    """`sm`: the CUDA device's number, where four numbers in a word are welcome and, of this cache, possible."""
    if not isinstance(kv, QuantizedKV):
        return KernelView(kv, kv, PLAIN, ONE_BY_ONE)
    kind = _KINDS[kv.data.dtype]
    if sm is not None and _has_words(kv):
        read = WORDS_CONVERTED if sm >= _CONVERTS else WORDS
        return KernelView(kv.data.view(torch.int32), kv.scales.flatten(-2).view(torch.int32), kind, read)
    return KernelView(kv.data.view(torch.uint8) if kind == E4M3 else kv.data, kv.scales.view(torch.int16), kind, ONE_BY_ONE)


def _has_words(kv: QuantizedKV) -> bool:
    """Whether heads, tokens and blocks begin at words, and scales come in pairs."""
    data, scales = kv
    is_even = all(step % 4 == 0 for step in (data.shape[-1], data.storage_offset(), *data.stride()[:-1]))
    pairs = scales.shape[-2] * scales.shape[-1], scales.storage_offset(), *scales.stride()[:-2]
    return is_even and scales.stride(-2) == scales.shape[-1] and all(step % 2 == 0 for step in pairs)
