"""What the kernels of all formats share: which part of the product a program computes, and where its results go."""

from __future__ import annotations

import triton
import triton.language as tl

LENGTHS = ("num_blocks",)


@triton.jit
def my_block(blocks, num_blocks, width, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which block of pairs and which columns this program computes: programs of GROUP blocks follow each other."""
    across = tl.cdiv(width, BLOCK_N)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    height = tl.minimum(num_blocks - first, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    block = first + within % height
    expert, start = tl.load(blocks + block), tl.load(blocks + num_blocks + block)
    return expert.to(tl.int64), start, tl.load(blocks + 2 * num_blocks + block), within // height * BLOCK_N


@triton.jit
def my_pairs(order, start, end, num_chosen, GATED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Pairs of a block, the last one repeated, and where they lie in x: their tokens, or their places in the order."""
    place = tl.minimum(start + tl.arange(0, BLOCK_M), end - 1)
    pair = tl.load(order + place)
    line = pair // num_chosen if GATED else place
    return pair, line.to(tl.int64)


@triton.jit
def weight_rows(start, width, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of W behind the outputs from `start` on: of the gate and of up by turns, or as they are."""
    n = start + tl.arange(0, BLOCK_N)
    row = n // 2 + (n % 2) * (width // 2) if GATED else n
    return tl.where(n < width, row, 0).to(tl.int64)


@triton.jit
def put(
    out, acc, start, end, pair, column, width, GATED: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store what was summed up: act(gate) · up in the experts' order, or the pairs' outputs in their own."""
    m = start + tl.arange(0, BLOCK_M)
    if GATED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        if KIND == 0:
            value = gate * tl.sigmoid(gate) * up
        elif KIND == 1:
            value = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
        else:
            value = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
        n, width = column // 2 + tl.arange(0, BLOCK_N // 2), width // 2
        line = m.to(tl.int64)
    else:
        value = acc
        n, line = column + tl.arange(0, BLOCK_N), pair.to(tl.int64)
    mask = (m < end)[:, None] & (n < width)[None, :]
    tl.store(out + line[:, None] * width + n[None, :], value.to(out.dtype.element_ty), mask=mask)
