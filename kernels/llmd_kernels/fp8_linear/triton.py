"""The product on a GPU: bytes of W become half floats by shifting bits, or multiply as they are where the device can.

A block of W has one scale, so the sums of a block are scaled as a whole and added up in float32. The grid hangs on shapes
alone. e4m3's exponent has a bias of 7 and a half's 15, so that shifted bits are the value over 256, subnormals included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmd_kernels.fp8_linear.tiles import BLOCK_K, tile_for

_LENGTHS = ("num_rows",)


@triton.jit
def widen(byte):
    """e4m3fn as uint8 → float32."""
    magnitude = (byte & 0x7F).to(tl.uint16)
    half = ((magnitude << 7) | ((byte & 0x80).to(tl.uint16) << 8)).to(tl.float16, bitcast=True)
    return tl.where(magnitude == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit(do_not_specialize=_LENGTHS)
def multiply(
    out, x, w, w_scale, x_scale, bias, num_rows, width, depth, x_stride, height, columns, num_blocks,
    HAS_X_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, NATIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] · (W · scale)ᵀ + bias; a block of W begins where a step of BLOCK_K does."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    row = x + m.to(tl.int64)[:, None] * x_stride
    column = w + n.to(tl.int64)[None, :] * depth
    scale_at = w_scale + (n // height) * num_blocks
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + j
        some = tl.load(row + k[None, :], mask=(m < num_rows)[:, None] & (k < depth)[None, :], other=0.0)
        weight = tl.load(column + k[:, None], mask=(n < width)[None, :] & (k < depth)[:, None], other=0)
        if NATIVE:
            part = tl.dot(some, weight.to(tl.float8e4nv, bitcast=True))
        else:
            part = tl.dot(some, widen(weight).to(some.dtype), input_precision="ieee")
        block = start // columns
        part *= tl.load(scale_at + block, mask=n < width, other=0.0)[None, :]
        if HAS_X_SCALE:
            part *= tl.load(x_scale + m * num_blocks + block, mask=m < num_rows, other=0.0)[:, None]
        total += part
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(m < num_rows)[:, None] & (n < width)[None, :])


def why_not(columns: int, depth: int) -> str | None:
    """What keeps the kernel from W's blocks of so many columns; None: nothing."""
    return None if columns >= depth or columns % BLOCK_K == 0 else f"blocks of {columns} columns, no multiple of {BLOCK_K}"


def linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    grid: torch.Tensor,
    height: int,
    columns: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [M, K], x_scale [M, column blocks] → [M, N] in x's dtype; e4m3 values of x multiply as such from sm_89 on."""
    if x.stride(1) != 1:
        x = x.contiguous()
    (num_rows, depth), width, tile = x.shape, weight.shape[0], tile_for(x.shape[0])
    native = x_scale is not None and x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9)
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    multiply[(triton.cdiv(width, tile.block_n), triton.cdiv(num_rows, tile.block_m))](
        out, x.to(torch.float8_e4m3fn) if native else x, weight.view(torch.uint8), grid, x_scale, bias, num_rows, width,
        depth, x.stride(0), height, columns, grid.shape[1], HAS_X_SCALE=x_scale is not None, HAS_BIAS=bias is not None,
        NATIVE=native, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=BLOCK_K, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return out
