"""The product on a GPU: one kernel makes tokens 8-bit, another multiplies, exactly. Grids hang on shapes alone.

Few rows: programs share the depth, and the last of them adds up their sums, which are integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmd_kernels.gpu import num_processors
from llmd_kernels.int8_linear.tiles import tile_for
from llmd_kernels.linear.table import num_shares
from llmd_kernels.linear.triton import MAX_BLOCKS, arrivals, sum_of_shares

_LENGTHS = ("num_rows",)
_MOST_AT_ONCE = 1 << 15  # features of a token that a program holds: all of most models', so that it waits once for them


@triton.jit(do_not_specialize=_LENGTHS)
def quantize(out, scale, x, given, num_rows, depth, x_stride, zero, HAS_GIVEN: tl.constexpr, BLOCK: tl.constexpr):
    """out int8 [M, K] = x / scale + zero, to the nearest; scale [M] is the given one or the row's largest over 127."""
    m = tl.program_id(0)
    row, k = x + m.to(tl.int64) * x_stride, tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, depth, BLOCK):
        some = tl.load(row + start + k, mask=start + k < depth, other=0.0).to(tl.float32)
        top = tl.where(some != some, float("inf"), tl.maximum(top, tl.abs(some)))
    most = tl.max(top, 0)
    bad = most == float("inf")
    if HAS_GIVEN:  # noqa: SIM108 (one side is not compiled)
        s = tl.load(given)
    else:
        s = tl.maximum(most / 127.0, 1.1754943508222875e-38)
    for start in range(0, depth, BLOCK):
        some = tl.load(row + start + k, mask=start + k < depth, other=0.0).to(tl.float32)
        q = tl.minimum(tl.maximum(some * (1.0 / s), -128.0 - zero), 127.0 - zero)
        q = (q + 12582912.0) - 12582912.0 + zero  # rounds to the nearest, halves to even
        tl.store(out + m.to(tl.int64) * depth + start + k, tl.where(bad, 0.0, q).to(tl.int8), mask=start + k < depth)
    tl.store(scale + m, tl.where(bad, float("nan"), s))


@triton.jit(do_not_specialize=_LENGTHS)
def multiply(
    out, parts, arrivals, x, w, x_scale, w_scale, w_sum, bias, num_rows, width, depth, zero,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, SHARES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [M, N] = ((x int8 [M, K] - zero) · W int8ᵀ) · x_scale · w_scale + bias; parts int32 [SHARES, M, N].

    W is the left factor: its rows fill the 64 that warp groups multiply, however few rows x has.
    """
    block, share = tl.program_id(0), tl.program_id(1)
    n, m = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_K)
    row = w + tl.minimum(n, width - 1).to(tl.int64)[:, None] * depth + j[None, :]
    token = x + tl.minimum(m, num_rows - 1).to(tl.int64)[None, :] * depth + j[:, None]
    size = tl.cdiv(tl.cdiv(depth, BLOCK_K), SHARES) * BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for start in range(share * size, tl.minimum((share + 1) * size, depth), BLOCK_K):
        inside = EVEN | (start + j < depth)
        weight = tl.load(row + start, mask=inside[None, :], other=0)
        some = tl.load(token + start, mask=inside[:, None], other=0)
        acc = tl.dot(weight, some, acc, out_dtype=tl.int32)
    if SHARES == 1:
        finish(out, acc, x_scale, w_scale, w_sum, bias, n, m, num_rows, width, zero, HAS_BIAS)
    else:
        acc, is_last = sum_of_shares(parts, arrivals, acc, block, share, n, m, num_rows, width, SHARES)
        if is_last:
            finish(out, acc, x_scale, w_scale, w_sum, bias, n, m, num_rows, width, zero, HAS_BIAS)


@triton.jit
def finish(out, acc, x_scale, w_scale, w_sum, bias, n, m, num_rows, width, zero, HAS_BIAS: tl.constexpr):
    """Store exact sums acc [N, M], scaled, with the bias."""
    acc -= zero * tl.load(w_sum + n, mask=n < width, other=0)[:, None]
    y = acc.to(tl.float32) * (
        tl.load(x_scale + m, mask=m < num_rows, other=0.0)[None, :]
        * tl.load(w_scale + n, mask=n < width, other=0.0)[:, None]
    )
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
    place = m.to(tl.int64)[None, :] * width + n[:, None]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=(n < width)[:, None] & (m < num_rows)[None, :])


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    row_sums: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    x_zero: int,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [M, K], weight [N, K] int8 with dense rows, x_scale one float32 or None → [M, N] in `out_dtype`, by default x's."""
    if x.stride(1) != 1:
        x = x.contiguous()
    (num_rows, depth), width, device, tile = x.shape, weight.shape[0], x.device, tile_for(x.shape[0])
    out = torch.empty(num_rows, width, dtype=out_dtype or x.dtype, device=device)
    if not out.numel():
        return out
    quantized = torch.empty(num_rows, depth, dtype=torch.int8, device=device)
    token_scale = torch.empty(num_rows, dtype=torch.float32, device=device)
    block = min(_MOST_AT_ONCE, triton.next_power_of_2(depth))
    quantize[(num_rows,)](
        quantized, token_scale, x, x_scale, num_rows, depth, x.stride(0), x_zero,
        HAS_GIVEN=x_scale is not None, BLOCK=block, num_warps=max(1, min(16, block // 1024)),
    )  # fmt: skip
    blocks, blocks_m = triton.cdiv(width, tile.block_n), triton.cdiv(num_rows, tile.block_m)
    most = tile.shares if blocks_m == 1 and blocks <= MAX_BLOCKS else 1
    shares = num_shares(most, blocks, triton.cdiv(depth, tile.block_k), num_processors(device))
    parts = torch.empty(shares, num_rows, width, dtype=torch.int32, device=device) if shares > 1 else out
    multiply[(blocks, shares, blocks_m)](
        out, parts, arrivals(device), quantized, weight, token_scale, scale, row_sums, bias, num_rows, width, depth, x_zero,
        HAS_BIAS=bias is not None, EVEN=depth % tile.block_k == 0, SHARES=shares, BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
