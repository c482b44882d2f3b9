"""The product on a GPU: one kernel makes tokens 8-bit, another multiplies, exactly. Grids hang on shapes alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmd_kernels.int8_linear.tiles import tile_for

_LENGTHS = ("num_rows",)


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
    out, x, w, x_scale, w_scale, w_sum, bias, num_rows, width, depth, zero,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [M, N] = ((x int8 [M, K] - zero) · W int8ᵀ) · x_scale · w_scale + bias."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    row, column = x + m.to(tl.int64)[:, None] * depth, w + n.to(tl.int64)[None, :] * depth
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, depth, BLOCK_K):
        k = start + j
        some = tl.load(row + k[None, :], mask=(m < num_rows)[:, None] & (k < depth)[None, :], other=0)
        weight = tl.load(column + k[:, None], mask=(n < width)[None, :] & (k < depth)[:, None], other=0)
        acc = tl.dot(some, weight, acc, out_dtype=tl.int32)
    acc -= zero * tl.load(w_sum + n, mask=n < width, other=0)[None, :]
    y = acc.to(tl.float32) * (
        tl.load(x_scale + m, mask=m < num_rows, other=0.0)[:, None]
        * tl.load(w_scale + n, mask=n < width, other=0.0)[None, :]
    )
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=(m < num_rows)[:, None] & (n < width)[None, :])


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
    (num_rows, depth), width, tile = x.shape, weight.shape[0], tile_for(x.shape[0])
    quantized = torch.empty(num_rows, depth, dtype=torch.int8, device=x.device)
    token_scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    quantize[(num_rows,)](
        quantized, token_scale, x, x_scale, num_rows, depth, x.stride(0), x_zero,
        HAS_GIVEN=x_scale is not None, BLOCK=1024,
    )  # fmt: skip
    out = torch.empty(num_rows, width, dtype=out_dtype or x.dtype, device=x.device)
    multiply[(triton.cdiv(width, tile.block_n), triton.cdiv(num_rows, tile.block_m))](
        out, quantized, weight, token_scale, scale, row_sums, bias, num_rows, width, depth, x_zero,
        HAS_BIAS=bias is not None, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return out
