"""Shrink and expand on a GPU: rows of x sorted by slot, a block of them a program, programs of empty blocks end at once.

Both grids hang on the number of rows, slots and outputs alone, never on which rows use which slot, so that one captured
graph serves every mix. For few rows shrink shares the inputs among programs, the last of which adds up what they found in
order: sums are float32, and the same whatever else is in the batch. Expand adds its block to y.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from llmd_kernels.linear.triton import MAX_BLOCKS, arrivals, sum_of_shares

if TYPE_CHECKING:
    from llmd_kernels.lora import LoraRows, LoraWeights

_BLOCK_M = 16
_BLOCK_K = 128
_BLOCK_N = 128
_FEW = 64  # rows, for up to which programs share the inputs
_SPLIT = 8
_LENGTHS = ("num_rows",)


@triton.jit(do_not_specialize=_LENGTHS)
def shrink(
    hidden, parts, arrivals, x, a, ranks, tokens, starts, num_rows, depth, x_stride, num_parts, max_rank,
    SHARES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """hidden[i, part, :rank] = x[tokens[i]] · A[slot, part, :rank]ᵀ; parts [SHARES, rows, parts, R] where shared."""
    block, share = tl.program_id(0) // SHARES, tl.program_id(0) % SHARES
    part, slot = tl.program_id(1), tl.program_id(2)
    first = tl.load(starts + slot) + block * BLOCK_M
    last = tl.load(starts + slot + 1)
    rank = tl.load(ranks + slot * num_parts + part)
    if (first >= last) | (rank == 0):
        return
    m, r, k = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    token = x + tl.load(tokens + m, mask=m < last, other=0).to(tl.int64)[None, :] * x_stride
    row = a + ((slot.to(tl.int64) * num_parts + part) * max_rank + r)[:, None] * depth
    total = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
    for start in range(share * BLOCK_K, depth, SHARES * BLOCK_K):
        at = start + k
        some = tl.load(token + at[:, None], mask=(m < last)[None, :] & (at < depth)[:, None], other=0.0)
        weight = tl.load(row + at[None, :], mask=(r < rank)[:, None] & (at < depth)[None, :], other=0.0)
        total = tl.dot(weight, some.to(weight.dtype), total, input_precision="ieee")
    width = num_parts * max_rank
    n, m = tl.where(r < rank, part * max_rank + r, width), tl.where(m < last, m, num_rows)  # what is outside is not stored
    place, inside = m[None, :] * width + n[:, None], (n < width)[:, None] & (m < num_rows)[None, :]
    if SHARES == 1:
        tl.store(hidden + place, total, mask=inside)
    else:
        counter = (slot * num_parts + part) * (tl.num_programs(0) // SHARES) + block
        total, is_last = sum_of_shares(parts, arrivals, total, counter, share, n, m, num_rows, width, SHARES)
        if is_last:
            tl.store(hidden + place, total, mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def expand(
    y, hidden, b, ranks, tokens, starts, part_starts, num_rows, width, y_stride, num_parts, max_rank,
    BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[tokens[i], outputs of part] += hidden[i, part, :rank] · B[slot, :rank, outputs of part]."""
    part, block_n = tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
    slot = tl.program_id(2)
    first = tl.load(starts + slot) + tl.program_id(0) * BLOCK_M
    last = tl.load(starts + slot + 1)
    rank = tl.load(ranks + slot * num_parts + part)
    n = tl.load(part_starts + part) + block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(part_starts + part + 1)
    if (first >= last) | (rank == 0):
        return
    m, r = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    token = tl.load(tokens + m, mask=m < last, other=0).to(tl.int64)
    place = (m[:, None] * num_parts + part) * max_rank + r[None, :]
    shrunk = tl.load(hidden + place, mask=(m < last)[:, None] & (r < rank)[None, :], other=0.0)
    b += slot.to(tl.int64) * max_rank * width
    row = tl.load(b + r[:, None] * width + n[None, :], mask=(r < rank)[:, None] & (n < end)[None, :], other=0.0)
    delta = tl.dot(shrunk.to(row.dtype), row, input_precision="ieee")
    out = y + token[:, None] * y_stride + n[None, :]
    mask = (m < last)[:, None] & (n < end)[None, :]
    tl.store(out, (tl.load(out, mask=mask).to(tl.float32) + delta).to(y.dtype.element_ty), mask=mask)


def add_lora(y: torch.Tensor, x: torch.Tensor, weights: LoraWeights, rows: LoraRows) -> torch.Tensor:
    """y [T, out] with dense rows, x [T, in]; any float dtypes."""
    if x.stride(1) != 1:
        x = x.contiguous()
    num_slots, num_parts, max_rank, depth = weights.a.shape
    num_rows, width = y.shape
    block_r = max(16, triton.next_power_of_2(max_rank))
    blocks_m = triton.cdiv(num_rows, _BLOCK_M)
    widest = max(high - low for low, high in zip(weights.part_starts, weights.part_starts[1:], strict=False))
    blocks_n = triton.cdiv(widest, _BLOCK_N)
    hidden = torch.empty(num_rows, num_parts, max_rank, dtype=torch.float32, device=y.device)
    shares = _SPLIT if num_rows <= _FEW and blocks_m * num_parts * num_slots <= MAX_BLOCKS else 1
    parts = torch.empty(shares, *hidden.shape, dtype=torch.float32, device=y.device) if shares > 1 else hidden
    part_starts = _on_device(weights.part_starts, y.device)
    shrink[(blocks_m * shares, num_parts, num_slots)](
        hidden, parts, arrivals(y.device), x, weights.a, weights.ranks, rows.tokens, rows.starts, num_rows, depth,
        x.stride(0), num_parts, max_rank, SHARES=shares, BLOCK_M=_BLOCK_M, BLOCK_K=_BLOCK_K, BLOCK_R=block_r,
    )  # fmt: skip
    expand[(blocks_m, num_parts * blocks_n, num_slots)](
        y, hidden, weights.b, weights.ranks, rows.tokens, rows.starts, part_starts, num_rows, width, y.stride(0),
        num_parts, max_rank, BLOCKS=blocks_n, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_R=block_r,
    )  # fmt: skip
    return y


_places: dict[tuple[tuple[int, ...], torch.device], torch.Tensor] = {}  # one entry a shape of layer


def _on_device(part_starts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    key = (part_starts, device)
    if key not in _places:
        _places[key] = torch.tensor(part_starts, dtype=torch.int32, device=device)
    return _places[key]
