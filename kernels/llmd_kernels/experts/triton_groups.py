"""Experts' products with weights of 4 or 8 bits that share scales by groups, as llmd_kernels.grouped_linear packs them.

They are read as there: the weight is the left factor, its whole numbers go to the tensor cores from registers, and the
sums of a group are scaled as a whole. Without offsets their zero is taken off before, which every float dtype can exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmd_kernels.experts.table import Tile, keeps_sums
from llmd_kernels.experts.triton_blocks import LENGTHS, my_block, my_pairs, put, weight_rows
from llmd_kernels.experts.triton_sorting import Blocks
from llmd_kernels.grouped_linear import GroupedWeight
from llmd_kernels.grouped_linear.triton import LIFTS, add_group, add_up, halves

_HALF = 32
_CHUNK = 2 * _HALF


@triton.jit(do_not_specialize=(*LENGTHS, "sums_stride"))
def multiply_groups(
    out, x, w, scale, offset, factors, columns, sums, order, blocks, num_blocks, width, depth, x_stride, num_chosen,
    num_chunks, sums_stride,
    GATED: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, CHUNKS: tl.constexpr,
    HALVES: tl.constexpr, LIFT: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_SUMS: tl.constexpr,
    EVEN: tl.constexpr, PTX: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """As triton_dense.multiply, in steps of CHUNKS. w uint8 [E, chunks, width, HALF or 2 HALF], scale and offset float16
    [E, groups, width], factors [E], columns int32 [E, depth], sums [groups, lines]. GROUP_SIZE: 0 where a row is a group;
    HALVES: of chunks, that are scaled as a whole; LIFT: by how much the whole numbers are too large.
    """
    expert, start, end, column = my_block(blocks, num_blocks, width, GROUP, BLOCK_N)
    if start >= end:
        return
    pair, line = my_pairs(order, start, end, num_chosen, GATED, BLOCK_M)
    row, j = weight_rows(column, width, GATED, BLOCK_N), tl.arange(0, HALF)
    num_groups = tl.cdiv(depth, GROUP_SIZE) if GROUP_SIZE else 1
    w += expert * num_chunks * width * (HALF * BITS // 4)
    scale += expert * num_groups * width
    if HAS_OFFSET:
        offset += expert * num_groups * width
    token = x + line[None, :] * x_stride
    FLOAT: tl.constexpr = x.dtype.element_ty
    ones = tl.full((BLOCK_N, HALF), 1.0, dtype=FLOAT)
    y, none = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32), tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(tl.cdiv(num_chunks, CHUNKS)):
        part, total = none, none
        for c in tl.static_range(CHUNKS):
            chunk = step * CHUNKS + c
            of_chunk = halves(w, chunk, row, width, x, BITS, PTX, HALF)
            for half in tl.static_range(2):
                k = chunk * 2 * HALF + half * HALF
                inside = (k + j < depth)[:, None]
                if HAS_COLUMNS:
                    at = tl.load(columns + expert * depth + k + j, mask=k + j < depth, other=0)
                    some = tl.load(token + at[:, None], mask=inside, other=0.0)
                elif EVEN:
                    some = tl.load(token + (k + j)[:, None])
                else:
                    some = tl.load(token + (k + j)[:, None], mask=inside, other=0.0)
                weight = of_chunk[half] if HAS_OFFSET else of_chunk[half] - LIFT
                part = tl.dot(weight, some, part, input_precision="ieee")
                if HAS_OFFSET and not HAS_SUMS:
                    total = tl.dot(ones, some, total, input_precision="ieee")
                if (2 * c + half + 1) % HALVES == 0:
                    group = tl.minimum(k // GROUP_SIZE, num_groups - 1) if GROUP_SIZE else 0
                    if HAS_OFFSET:
                        y = add_group(
                            y, part, total, scale, offset, sums, group, row, line, width, sums_stride, LIFT, True, HAS_SUMS
                        )
                    else:
                        y += part * tl.load(scale + group * width + row).to(tl.float32)[:, None]
                    part, total = none, none
    y *= tl.load(factors + expert)
    put(out, tl.trans(y), start, end, pair, column, width, GATED, KIND, BLOCK_M, BLOCK_N)


def why_not(weight: GroupedWeight) -> str | None:
    """What keeps the kernel from a stacked weight; None: nothing."""
    if weight.layout != "chunks":
        return f"weights packed in {weight.layout}"
    if weight.group_size % _HALF and weight.group_size < weight.in_features:
        return f"groups of {weight.group_size}, no multiple of {_HALF}"
    return None


def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: GroupedWeight,
    factors: torch.Tensor,
    blocks: Blocks,
    tile: Tile,
    num_chosen: int,
    kind: int | None,
) -> None:
    """Fill out with the pairs' products; factors float32 [E]; `kind`: they are gate and up, and that is the activation."""
    width, depth = weight.out_features, weight.in_features
    num_chunks = weight.packed.shape[1]
    group = 0 if weight.group_size >= depth else weight.group_size
    has_columns, has_ptx = weight.columns is not None, x.is_cuda and torch.version.hip is None and x.dtype in LIFTS
    has_offset = weight.offset is not None
    has_sums = (
        has_offset and not has_columns and not keeps_sums(tile)
    )  # for many pairs, each token's are worth a kernel of their own
    sums = _sums(x, group or depth) if has_sums else out
    lift = LIFTS[x.dtype] if has_ptx and weight.bits == 4 else 0
    multiply_groups[(blocks.total * triton.cdiv(width, tile.block_n),)](
        out, x, weight.packed, weight.scale, weight.offset, factors, weight.columns, sums, blocks.order, blocks.table,
        blocks.total, width, depth, x.stride(0), num_chosen, num_chunks, sums.stride(0),
        GATED=kind is not None, KIND=kind or 0, BITS=weight.bits, GROUP_SIZE=group,
        LIFT=float(lift + (0 if has_offset else weight.zero)), HAS_OFFSET=has_offset, HAS_COLUMNS=has_columns,
        HAS_SUMS=has_sums, EVEN=depth % _CHUNK == 0 and not has_columns, PTX=has_ptx, GROUP=tile.group,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HALF=_HALF, num_warps=tile.warps, num_stages=tile.stages,
        **steps(group, num_chunks),
    )  # fmt: skip


def steps(group_size: int, num_chunks: int) -> dict[str, int]:
    """How many chunks a step has, and halves of them that are scaled as a whole; `group_size` 0: all features share one."""
    chunks = 2 if num_chunks % 2 == 0 else 1
    return {"CHUNKS": chunks, "HALVES": next(size for size in (2 * chunks, 2, 1) if group_size % (size * _HALF) == 0)}


def _sums(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """[groups, lines] float32, the sums of each line of x over each group."""
    num_lines, depth = x.shape
    sums = torch.empty(triton.cdiv(depth, group_size), num_lines, dtype=torch.float32, device=x.device)
    block = min(1024, triton.next_power_of_2(group_size))
    add_up[(num_lines, len(sums))](
        sums, x, num_lines, depth, x.stride(0), num_lines, group_size, BLOCK=block, num_warps=1 if block < 512 else 4
    )
    return sums
