"""Which experts each token goes to, and pairs of token and expert in the experts' order: kernels that nobody waits for."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llmd_kernels.experts.table import CHUNK, Tile, num_blocks, sorted_at_once

_LENGTHS = ("num_pairs", "num_chunks", "num_blocks")


@triton.jit
def choose(
    ids, weights, logits, num_experts, num_chosen, stride, NORMALIZED: tl.constexpr, E: tl.constexpr, K: tl.constexpr
):
    """A row of ids and weights [T, k]: the largest of softmax(logits), of equal ones the first."""
    token = tl.program_id(0).to(tl.int64)
    e, slots = tl.arange(0, E), tl.arange(0, K)
    row = tl.load(logits + token * stride + e, mask=e < num_experts, other=float("-inf")).to(tl.float32)
    p = tl.exp(row - tl.max(row, 0))
    p = p / tl.sum(p, 0)
    found, best = tl.zeros((K,), dtype=tl.int32), tl.zeros((K,), dtype=tl.float32)
    for slot in range(num_chosen):
        top = tl.max(p, 0)
        first = tl.minimum(tl.min(tl.where(p == top, e, E), 0), num_experts - 1)  # NaN equals nothing
        found, best = tl.where(slots == slot, first, found), tl.where(slots == slot, top, best)
        p = tl.where(e == first, -1.0, p)
    if NORMALIZED:
        best = best / tl.sum(best, 0)
    tl.store(ids + token * num_chosen + slots, found.to(tl.int64), mask=slots < num_chosen)
    tl.store(weights + token * num_chosen + slots, best, mask=slots < num_chosen)


@triton.jit
def chosen(ids, at, end, E: tl.constexpr):
    """Which expert each of these pairs chose, as one 1 a row: int32 [pairs, E]."""
    number = tl.load(ids + at, mask=at < end, other=-1)
    return (number[:, None] == tl.arange(0, E)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=_LENGTHS)
def count(counts, ids, num_pairs, E: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """counts int32 [chunks, E]: how many pairs of a chunk chose each expert."""
    start = tl.program_id(0) * CHUNK
    end = tl.minimum(start + CHUNK, num_pairs)
    total = tl.zeros((E,), dtype=tl.int32)
    for at in range(start, end, BLOCK):
        total += tl.sum(chosen(ids, at + tl.arange(0, BLOCK), end, E), 0)
    tl.store(counts + tl.program_id(0) * E + tl.arange(0, E), total)


@triton.jit(do_not_specialize=_LENGTHS)
def sort(
    order, blocks, counts, ids, num_pairs, num_chunks, num_blocks,
    ALONE: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """order int32 [P]: pairs by expert, of one expert as they come; blocks int32 [3, B]: expert, first place, last + 1.

    Each program puts a chunk of pairs in its places, and fills its share of the blocks. ALONE: there is one, which counts.
    """
    chunk = tl.program_id(0)
    e, i = tl.arange(0, E), tl.arange(0, BLOCK)
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, num_pairs)
    total, before = tl.zeros((E,), dtype=tl.int32), tl.zeros((E,), dtype=tl.int32)
    if ALONE:
        for at in range(start, end, BLOCK):
            total += tl.sum(chosen(ids, at + i, end, E), 0)
    else:
        for at in range(0, num_chunks, BLOCK):
            other = (at + i)[:, None]
            theirs = tl.load(counts + other * E + e[None, :], mask=other < num_chunks, other=0)
            total += tl.sum(theirs, 0)
            before += tl.sum(tl.where(other < chunk, theirs, 0), 0)
    last = tl.cumsum(total, 0)
    num_own = (total + BLOCK_M - 1) // BLOCK_M
    last_block = tl.cumsum(num_own, 0)
    share = tl.cdiv(num_blocks, num_chunks)
    for at in range(chunk * share, tl.minimum(chunk * share + share, num_blocks), BLOCK):
        b = at + i
        expert = tl.sum((last_block[None, :] <= b[:, None]).to(tl.int32), 1)
        own = expert[:, None] == e[None, :]
        first = tl.sum(tl.where(own, (last - total - (last_block - num_own) * BLOCK_M)[None, :], 0), 1) + b * BLOCK_M
        final = tl.minimum(tl.sum(tl.where(own, last[None, :], 0), 1), first + BLOCK_M)
        tl.store(blocks + b, expert, mask=b < num_blocks)
        tl.store(blocks + num_blocks + b, first, mask=b < num_blocks)
        tl.store(blocks + 2 * num_blocks + b, tl.where(expert < E, final, 0), mask=b < num_blocks)
    next_place = last - total + before
    for at in range(start, end, BLOCK):
        own = chosen(ids, at + i, end, E)
        place = tl.sum(own * (next_place[None, :] + tl.cumsum(own, 0) - 1), 1)
        tl.store(order + place, at + i, mask=tl.sum(own, 1) > 0)
        next_place += tl.sum(own, 0)


def route(logits: torch.Tensor, num_chosen: int, *, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As in the package."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_tokens, num_experts = logits.shape
    ids = torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=logits.device)
    choose[(num_tokens,)](
        ids, weights, logits, num_experts, num_chosen, logits.stride(0), NORMALIZED=normalized,
        E=triton.next_power_of_2(num_experts), K=triton.next_power_of_2(num_chosen), num_warps=1,
    )  # fmt: skip
    return ids, weights


class Blocks(NamedTuple):
    """Pairs in the experts' order, and which of them a program computes."""

    order: torch.Tensor  # int32 [P]
    table: torch.Tensor  # int32 [3, B]: expert, first place, last + 1
    tile: Tile
    total: int  # how many blocks there are, empty ones among them


def sort_pairs(ids: torch.Tensor, num_experts: int, tile: Tile) -> Blocks:
    """ids [T, k] int64, dense."""
    num_pairs, padded = ids.numel(), max(16, triton.next_power_of_2(num_experts))
    num_chunks = triton.cdiv(num_pairs, CHUNK)
    total = num_blocks(ids.shape[0], ids.shape[1], num_experts, tile.block_m)
    order = torch.empty(num_pairs, dtype=torch.int32, device=ids.device)
    table = torch.empty(3, total, dtype=torch.int32, device=ids.device)
    sizes = {"E": padded, "CHUNK": CHUNK, "BLOCK": sorted_at_once(padded), "num_warps": 8}
    counts = None
    if num_chunks > 1:
        counts = torch.empty(num_chunks, padded, dtype=torch.int32, device=ids.device)
        count[(num_chunks,)](counts, ids, num_pairs, **sizes)
    sort[(num_chunks,)](
        order, table, counts, ids, num_pairs, num_chunks, total, ALONE=num_chunks == 1, BLOCK_M=tile.block_m, **sizes
    )
    return Blocks(order, table, tile, total)
