"""Experts' products with weights in a float dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmd_kernels.experts.table import Tile
from llmd_kernels.experts.triton_blocks import LENGTHS, my_block, my_pairs, put, weight_rows
from llmd_kernels.experts.triton_sorting import Blocks

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=LENGTHS)
def multiply(
    out, x, w, order, blocks, num_blocks, width, depth, x_stride, num_chosen,
    GATED: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr, FEW: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x · W[expert]ᵀ for the pairs of a block; W [E, width, depth].

    GATED: x [T, depth] → act(gate) · up [P, width / 2] in the experts' order; else x [P, depth] in that order → [P, width]
    in the pairs' own.
    """
    expert, start, end, column = my_block(blocks, num_blocks, width, GROUP, BLOCK_N)
    if start >= end:
        return
    pair, line = my_pairs(order, start, end, num_chosen, GATED, BLOCK_M)
    j = tl.arange(0, BLOCK_K)
    some_at = x + line[:, None] * x_stride + j[None, :]
    row = expert * width + weight_rows(column, width, GATED, BLOCK_N)
    weight_at = w + row[:, None] * depth + j[None, :]
    if FEW:  # noqa: SIM108 (one side is not compiled)
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, depth, BLOCK_K):
        if EVEN:
            some, weight = tl.load(some_at + k), tl.load(weight_at + k)
        else:
            mask = (j + k < depth)[None, :]
            some, weight = tl.load(some_at + k, mask=mask, other=0.0), tl.load(weight_at + k, mask=mask, other=0.0)
        if FEW:
            acc = tl.dot(weight, tl.trans(some), acc, input_precision="ieee")
        else:
            acc = tl.dot(some, tl.trans(weight), acc, input_precision="ieee")
    if FEW:
        acc = tl.trans(acc)
    put(out, acc, start, end, pair, column, width, GATED, KIND, BLOCK_M, BLOCK_N)


def launch(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, blocks: Blocks, tile: Tile, num_chosen: int, kind: int | None
) -> None:
    """Fill out with the pairs' products; weight [E, width, depth]; `kind`: of gate and up, and that is the activation."""
    (_, width, depth), x = weight.shape, x.to(weight.dtype)
    multiply[(blocks.total * triton.cdiv(width, tile.block_n),)](
        out, x, weight, blocks.order, blocks.table, blocks.total, width, depth, x.stride(0), num_chosen,
        GATED=kind is not None, KIND=kind or 0, EVEN=depth % tile.block_k == 0, FEW=tile.is_few, GROUP=tile.group,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
