"""The product on a GPU, and the layout it reads: W is dequantized in registers, right where the dot product takes it.

W lies in chunks of 64 input features, all rows of a chunk side by side, so that a tile is one stretch of memory. A chunk's
two halves of 32 features share bytes (4 bits: low and high) or follow each other (8 bits); each half is multiplied by its
own columns of x, so nothing is interleaved. Few rows: the chunks are split among programs whose sums a second kernel adds
up in order. Grids hang on shapes alone, sums on neither the other rows nor the time: a row is the same in every batch of
one kind of tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from llmd_kernels.grouped_linear.tiles import tile_for

if TYPE_CHECKING:
    from llmd_kernels.grouped_linear import GroupedWeight

_HALF = 32
_CHUNK = 2 * _HALF
_LENGTHS = ("num_rows",)


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, K] → uint8 [chunks, N, 32 or 64]."""
    halves = F.pad(q, (0, -q.shape[1] % _CHUNK)).view(q.shape[0], -1, 2, _HALF).transpose(0, 1)
    if bits == 4:
        return (halves[:, :, 0] | (halves[:, :, 1] << 4)).contiguous()
    return halves.flatten(2).contiguous()


def unpack(packed: torch.Tensor, bits: int, depth: int) -> torch.Tensor:
    """Back to uint8 [N, K]."""
    chunks = torch.cat((packed & 15, packed >> 4), dim=2) if bits == 4 else packed
    return chunks.transpose(0, 1).flatten(1)[:, :depth]


@triton.jit
def half_chunk(
    w, scale, offset, n, chunk, part: tl.constexpr, width, depth, group_size, zero, factor,
    BITS: tl.constexpr, EVEN: tl.constexpr, HAS_OFFSET: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Half a chunk of W for columns n of the output: float32 [HALF, N]."""
    j = tl.arange(0, HALF)
    k = chunk * 2 * HALF + part * HALF + j
    if BITS == 4:
        place = (chunk * width + n).to(tl.int64)[None, :] * HALF + j[:, None]
        byte = tl.load(w + place, mask=(n < width)[None, :], other=0)
        q = (byte & 15) if part == 0 else (byte >> 4)
    else:
        place = (chunk * width + n).to(tl.int64)[None, :] * 2 * HALF + part * HALF + j[:, None]
        q = tl.load(w + place, mask=(n < width)[None, :], other=0)
    if EVEN:  # one group: one vector of scales
        group = (chunk * 2 * HALF + part * HALF) // group_size
        at, mask = (group * width + n)[None, :], ((n < width) & (group * group_size < depth))[None, :]
    else:
        at, mask = (k // group_size)[:, None] * width + n[None, :], (k < depth)[:, None] & (n < width)[None, :]
    value = (q.to(tl.float32) - zero) * (tl.load(scale + at, mask=mask, other=0.0).to(tl.float32) * factor)
    if HAS_OFFSET:
        value += tl.load(offset + at, mask=mask, other=0.0).to(tl.float32) * factor
    return value


@triton.jit(do_not_specialize=_LENGTHS)
def multiply(
    out, x, w, scale, offset, bias, factor, num_rows, width, depth, x_stride, group_size, zero,
    BITS: tl.constexpr, EVEN: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out [SPLIT, M, N] = x [M, K] · Wᵀ over each share of the chunks; with a SPLIT of 1 the bias is added."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, HALF)
    num_chunks = tl.cdiv(depth, 2 * HALF)
    share = tl.cdiv(num_chunks, SPLIT)
    first = tl.program_id(2) * share
    row = x + m.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for chunk in range(first, tl.minimum(first + share, num_chunks)):
        for part in tl.static_range(2):
            k = chunk * 2 * HALF + part * HALF + j
            some = tl.load(row + k[None, :], mask=(m < num_rows)[:, None] & (k < depth)[None, :], other=0.0)
            weight = half_chunk(
                w, scale, offset, n, chunk, part, width, depth, group_size, zero, factor, BITS, EVEN, HAS_OFFSET, HALF
            )
            acc = tl.dot(some, weight.to(some.dtype), acc, input_precision="ieee")
    if HAS_BIAS and SPLIT == 1:
        acc += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    place = (tl.program_id(2) * num_rows + m).to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m < num_rows)[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=_LENGTHS)
def add_up(out, parts, bias, num_rows, width, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """out [M, N] = the sum of parts [SPLIT, M, N], in order, + bias."""
    m = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts + (part * num_rows + m).to(tl.int64) * width + n, mask=n < width, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)
    tl.store(out + m.to(tl.int64) * width + n, acc.to(out.dtype.element_ty), mask=n < width)


def linear(x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], weight in chunks, bias [N] → [M, N] in x's dtype."""
    if weight.columns is not None:
        x = x.index_select(1, weight.columns)
    elif x.stride(1) != 1:
        x = x.contiguous()
    (num_rows, depth), width, group_size = x.shape, weight.out_features, weight.group_size
    tile = tile_for(num_rows, width, triton.cdiv(depth, _CHUNK))
    has_offset = weight.offset is not None
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    parts = out if tile.split == 1 else torch.empty(tile.split, num_rows, width, dtype=torch.float32, device=x.device)
    multiply[(triton.cdiv(width, tile.block_n), triton.cdiv(num_rows, tile.block_m), tile.split)](
        parts, x, weight.packed, weight.scale, weight.offset, bias, weight.factor, num_rows, width, depth, x.stride(0),
        group_size, 0 if has_offset else weight.zero, BITS=weight.bits,
        EVEN=group_size % _HALF == 0 or group_size >= depth, HAS_OFFSET=has_offset, HAS_BIAS=bias is not None,
        SPLIT=tile.split, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HALF=_HALF, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if tile.split > 1:
        add_up[(triton.cdiv(width, 1024), num_rows)](
            out, parts, bias, num_rows, width, HAS_BIAS=bias is not None, SPLIT=tile.split, BLOCK_N=1024
        )
    return out
