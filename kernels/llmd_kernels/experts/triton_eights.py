"""Experts' products with weights of 8 bits: whole numbers with a scale a row, or e4m3 scaled by row, by block or as a whole.

Activations are 8 bits wide too, by a scale a token, or a token and block, before they are multiplied; or e4m3 weights are
widened to the activations' own dtype. See llmd_kernels.int8_linear and llmd_kernels.fp8_linear.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmd_kernels.experts.table import BLOCK_K, Tile
from llmd_kernels.experts.triton_blocks import LENGTHS, my_block, my_pairs, put, weight_rows
from llmd_kernels.experts.triton_sorting import Blocks
from llmd_kernels.experts.weights import Fp8Weight
from llmd_kernels.fp8_linear.triton import quantize, way_for, weights
from llmd_kernels.int8_linear import Int8Weight
from llmd_kernels.int8_linear.triton import quantize as quantize_int8

_BLOCK = 1024


@triton.jit(do_not_specialize=LENGTHS)
def multiply_int8(
    out, x, w, x_scale, w_scale, order, blocks, num_blocks, width, depth, num_chosen,
    GATED: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr, FEW: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As dense.multiply. x int8 with dense rows and a scale a row, w int8 [E, width, depth], w_scale [E, width]."""
    expert, start, end, column = my_block(blocks, num_blocks, width, GROUP, BLOCK_N)
    if start >= end:
        return
    pair, line = my_pairs(order, start, end, num_chosen, GATED, BLOCK_M)
    j = tl.arange(0, BLOCK_K)
    row = expert * width + weight_rows(column, width, GATED, BLOCK_N)
    some_at, weight_at = x + line[:, None] * depth + j[None, :], w + row[:, None] * depth + j[None, :]
    if FEW:  # noqa: SIM108 (one side is not compiled)
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, depth, BLOCK_K):
        if EVEN:
            some, weight = tl.load(some_at + k), tl.load(weight_at + k)
        else:
            mask = (j + k < depth)[None, :]
            some, weight = tl.load(some_at + k, mask=mask, other=0), tl.load(weight_at + k, mask=mask, other=0)
        if FEW:
            acc = tl.dot(weight, tl.trans(some), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(some, tl.trans(weight), acc, out_dtype=tl.int32)
    if FEW:
        acc = tl.trans(acc)
    y = acc.to(tl.float32) * (tl.load(x_scale + line)[:, None] * tl.load(w_scale + row)[None, :])
    put(out, y, start, end, pair, column, width, GATED, KIND, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=LENGTHS)
def multiply_fp8(
    out, x, w, x_scale, w_scale, order, blocks, num_blocks, width, depth, x_stride, num_chosen, height, columns, num_high,
    num_wide, scale_row_stride, scale_stride,
    GATED: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr, FEW: tl.constexpr, HAS_X_SCALE: tl.constexpr,
    WAY: tl.constexpr, ONE_BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As triton_dense.multiply. w uint8 [E, width, depth] holds e4m3, w_scale is float32 [E, num_high, num_wide] for blocks
    of `height` rows and `columns` columns, x_scale [lines, num_wide]; a block begins where a step of BLOCK_K does.
    """
    expert, start, end, column = my_block(blocks, num_blocks, width, GROUP, BLOCK_N)
    if start >= end:
        return
    pair, line = my_pairs(order, start, end, num_chosen, GATED, BLOCK_M)
    j = tl.arange(0, BLOCK_K)
    row = weight_rows(column, width, GATED, BLOCK_N)
    some_at = x + line[:, None] * x_stride + j[None, :]
    weight_at = w + (expert * width + row)[:, None] * depth + j[None, :]
    scale_at = w_scale + (expert * num_high + row // height) * num_wide
    x_scale_at = x_scale + line * scale_row_stride if HAS_X_SCALE else line
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if FEW:
        y = tl.trans(y)
    for k in range(0, depth, BLOCK_K):
        if EVEN:
            some, byte = tl.load(some_at + k), tl.load(weight_at + k)
        else:
            mask = (j + k < depth)[None, :]
            some, byte = tl.load(some_at + k, mask=mask, other=0.0), tl.load(weight_at + k, mask=mask, other=0)
        weight = weights(byte, x, WAY)
        if FEW:
            part = tl.dot(weight, tl.trans(some), input_precision="ieee")
        else:
            part = tl.dot(some, tl.trans(weight), input_precision="ieee")
        if not ONE_BLOCK:
            part = scaled(part, scale_at + k // columns, x_scale_at + k // columns * scale_stride, FEW, HAS_X_SCALE)
        y += part
    if ONE_BLOCK:
        y = scaled(y, scale_at, x_scale_at, FEW, HAS_X_SCALE)
    if FEW:
        y = tl.trans(y)
    put(out, y, start, end, pair, column, width, GATED, KIND, BLOCK_M, BLOCK_N)


@triton.jit
def scaled(y, scale_at, x_scale_at, FEW: tl.constexpr, HAS_X_SCALE: tl.constexpr):
    """y [M, N], FEW: [N, M], by scales [N], and [M] where x has them."""
    scale = tl.load(scale_at)
    y *= scale[:, None] if FEW else scale[None, :]
    if HAS_X_SCALE:
        own = tl.load(x_scale_at)
        y *= own[None, :] if FEW else own[:, None]
    return y


def why_not(weight: Fp8Weight) -> str | None:
    """What keeps the kernel from a stacked weight; None: nothing."""
    _, columns, depth = _blocks_of(weight)
    is_fit = columns >= depth or columns % BLOCK_K == 0
    return None if is_fit else f"blocks of {columns} columns, no multiple of {BLOCK_K}"


def _blocks_of(weight: Fp8Weight) -> tuple[int, int, int]:
    """Rows and columns of W that share a scale, and columns of W."""
    num_experts, width, depth = weight.weight.shape
    if weight.block is not None:
        return *weight.block, depth
    return (width if weight.scale.numel() == num_experts else 1), depth, depth


def launch_int8(
    out: torch.Tensor, x: torch.Tensor, weight: Int8Weight, blocks: Blocks, tile: Tile, num_chosen: int, kind: int | None
) -> None:
    """Fill out with the pairs' products; `kind`: they are gate and up, and that is the activation."""
    (num_rows, depth), width = x.shape, weight.scale.shape[1]
    quantized = torch.empty(num_rows, depth, dtype=torch.int8, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    quantize_int8[(num_rows,)](quantized, scale, x, None, num_rows, depth, x.stride(0), 0, HAS_GIVEN=False, BLOCK=_BLOCK)
    multiply_int8[(blocks.total * triton.cdiv(width, tile.block_n),)](
        out, quantized, weight.packed, scale, weight.scale, blocks.order, blocks.table, blocks.total, width, depth,
        num_chosen, **_constants(tile, depth, kind),
    )  # fmt: skip


def launch_fp8(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: Fp8Weight,
    x_scale: torch.Tensor | None,
    blocks: Blocks,
    tile: Tile,
    num_chosen: int,
    kind: int | None,
) -> None:
    """The same; x_scale: one number for all experts, with activations "tensor"."""
    num_experts, width, depth = weight.weight.shape
    height, columns, _ = _blocks_of(weight)
    grid = weight.scale.reshape(num_experts, -(-width // height), -(-depth // columns)).to(torch.float32)
    small, scales = x, None
    if weight.activations != "float":
        small, scales = quantize(x, columns if weight.activations == "group" else depth, x_scale, grid.shape[2])
    multiply_fp8[(blocks.total * triton.cdiv(width, tile.block_n),)](
        out, small, weight.weight.view(torch.uint8), scales, grid, blocks.order, blocks.table, blocks.total, width, depth,
        small.stride(0), num_chosen, height, columns, grid.shape[1], grid.shape[2],
        *((0, 0) if scales is None else scales.stride()),
        HAS_X_SCALE=scales is not None, WAY=way_for(x, is_scaled=scales is not None), ONE_BLOCK=grid.shape[2] == 1,
        **_constants(tile, depth, kind),
    )  # fmt: skip


def _constants(tile: Tile, depth: int, kind: int | None) -> dict[str, int | bool]:
    return {
        "GATED": kind is not None, "KIND": kind or 0, "EVEN": depth % tile.block_k == 0, "FEW": tile.is_few,
        "GROUP": tile.group, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
