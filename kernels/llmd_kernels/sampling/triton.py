"""Sampling on a GPU: every pass cuts each row into parts, and the next pass adds the parts up before it begins.

Thresholds are found on the bits of the logits, ordered as the floats are: eight passes, each of which compares all tokens
with sixteen thresholds and so settles four bits. Programs of rows that do not want a pass end at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from llmd_kernels.gpu import num_processors
from llmd_kernels.sampling.tiles import BLOCK, COUNTED, num_splits

if TYPE_CHECKING:
    from llmd_kernels.sampling import Knobs

if triton.knobs.runtime.interpret:
    from triton.language import math as functions
else:  # what torch's own exp is made of: equal to the last bit
    from triton.language.extra import libdevice as functions

_STEPS = 8  # of four bits
_TOP_K, _TOP_P = 1, 2  # what a threshold is for


@triton.jit
def ordered(x):
    """Floats as int64 from 0 to 2³² - 1, in their order; NaN is largest, both zeros are one."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(x == 0.0, 0, key)
    return tl.where(x != x, 0x7FFFFFFF, key).to(tl.int64) + 0x80000000


@triton.jit
def best_of(maxima, row, SPLITS: tl.constexpr):
    """A row's largest logit and the first token that has it, from the parts."""
    packed = tl.max(tl.load(maxima + row * SPLITS + tl.arange(0, SPLITS)), axis=0)
    key = ((packed >> 31) - 0x80000000).to(tl.int32)
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return value, 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@triton.jit
def weight_of(x, best, inverse, least, key, low):
    """The fixed-point weight of tokens that min_p and the thresholds leave, of others 0."""
    relative = functions.exp((x - best) * inverse)
    weight = (relative * 1099511627776.0).to(tl.int64)
    return tl.where((relative >= least) & (key >= low), weight, 0)


@triton.jit
def wants(values, line, width, KIND: tl.constexpr):
    """Whether a row has a cut of this kind."""
    return tl.load(values + line * 4 + 1) < width if KIND == 1 else tl.load(values + line * 4 + 2) < 1.0


@triton.jit
def target_of(values, line, totals, row, KIND: tl.constexpr, SPLITS: tl.constexpr):
    """What the tokens above the threshold have to reach: so many of them, or so much weight."""
    if KIND == 1:
        target = tl.load(values + line * 4 + 1).to(tl.int64)
    else:
        total = tl.sum(tl.load(totals + row * SPLITS + tl.arange(0, SPLITS)), axis=0)
        share = tl.load(values + line * 4 + 2) * total.to(tl.float64)
        whole = share.to(tl.int64)
        target = tl.minimum(whole + (whole.to(tl.float64) < share).to(tl.int64), total)
    return target


@triton.jit
def settled(step, sums, lows, target, row, num_rows, SPLITS: tl.constexpr):
    """The threshold's first `step` digits, from the sums of the pass before."""
    split, digit = tl.arange(0, SPLITS), tl.arange(0, 16)
    before = (step + 1) % 2 * num_rows + row
    parts = tl.load(sums + (before * SPLITS + split[:, None]) * 16 + digit[None, :])
    reached = tl.sum((tl.sum(parts, axis=0) >= target).to(tl.int64), axis=0)
    low = tl.load(lows + (step - 1) * num_rows + row)
    return low + (tl.maximum(reached - 1, 0) << (32 - 4 * step))


@triton.jit
def maxima_of(maxima, x, x_stride, width, chunk, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of each part and the first token that has it, in one number."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x += row * x_stride
    found = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, width), BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = ordered(tl.load(x + i, mask=i < width, other=float("-inf")).to(tl.float32))
        packed = (key << 31) | (0x7FFFFFFF - i).to(tl.int64)
        found = tl.maximum(found, tl.where(i < width, packed, 0))
    tl.store(maxima + row * SPLITS + split, tl.max(found, axis=0))


@triton.jit(do_not_specialize=("step", "num_rows"))
def narrow(
    sums, lows, totals, thresholds, x, rows, values, maxima, x_stride, width, chunk, step, num_rows,
    KIND: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the tokens at or above each of sixteen thresholds add up to, in this part of the row."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line = tl.load(rows + row)
    inverse = tl.load(values + line * 4).to(tl.float32)
    if (inverse == 0.0) | (wants(values, line, width, KIND) == 0):
        return
    low = tl.zeros((), dtype=tl.int64)
    if step > 0:
        low = settled(step, sums, lows, target_of(values, line, totals, row, KIND, SPLITS), row, num_rows, SPLITS)
    if split == 0:
        tl.store(lows + step * num_rows + row, low)
    least, floor = tl.load(values + line * 4 + 3).to(tl.float32), low * 0
    best, _ = best_of(maxima, row, SPLITS)
    if KIND == 2:
        floor = tl.load(thresholds + row)
    digit = tl.arange(0, 16)
    edges = low + (digit.to(tl.int64) << (28 - 4 * step))
    x += row * x_stride
    found = tl.zeros((BLOCK, 16), dtype=tl.int32 if KIND == 1 else tl.int64)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, width), BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < width, other=float("-inf")).to(tl.float32)
        key = ordered(value)
        amount = (i < width).to(tl.int32) if KIND == 1 else weight_of(value, best, inverse, least, key, floor)
        found += tl.where(key[:, None] >= edges[None, :], amount[:, None], 0)
    place = ((step % 2 * num_rows + row) * SPLITS + split) * 16
    tl.store(sums + place + digit, tl.sum(found, axis=0).to(tl.int64))


@triton.jit(do_not_specialize=("num_rows",))
def tally(
    totals, thresholds, sums, lows, x, rows, values, maxima, x_stride, width, chunk, num_rows,
    KIND: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight that the cuts so far leave in each part. KIND: 0 no threshold yet, 1 top_k's is new, 2 top_p's too."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line = tl.load(rows + row)
    inverse = tl.load(values + line * 4).to(tl.float32)
    if inverse == 0.0:
        return
    low = tl.zeros((), dtype=tl.int64)
    if KIND != 0:
        if KIND == 2:
            low = tl.load(thresholds + row)
        if wants(values, line, width, KIND):
            target = target_of(values, line, totals, row, KIND, SPLITS)
            low = tl.maximum(low, settled(8, sums, lows, target, row, num_rows, SPLITS))
        if KIND == 2:
            thresholds += num_rows
            totals += num_rows * SPLITS
    if split == 0:
        tl.store(thresholds + row, low)
    least = tl.load(values + line * 4 + 3).to(tl.float32)
    best, _ = best_of(maxima, row, SPLITS)
    x += row * x_stride
    found = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, width), BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < width, other=float("-inf")).to(tl.float32)
        found += weight_of(value, best, inverse, least, ordered(value), low)
    tl.store(totals + row * SPLITS + split, tl.sum(found, axis=0))


@triton.jit
def mix(x):
    """The finaliser of splitmix64, on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def uniform_of(seed, counter):
    """One float64 in [0, 1) from a seed and a counter, uint64."""
    golden = tl.full((), 0x9E3779B97F4A7C15, dtype=tl.uint64)
    mixed = mix(mix(seed + golden) + mix(counter * golden + 1))
    return (mixed >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=("num_rows",))
def pick(
    tokens, largest, totals, thresholds, x, rows, counters, seeds, values, maxima, x_stride, width, chunk, num_rows,
    DRAWS: tl.constexpr, KIND: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's token: its first largest, or the first one whose weights up to it exceed the drawn unit's rank."""
    row = tl.program_id(0).to(tl.int64)
    line = tl.load(rows + row)
    best, token = best_of(maxima, row, SPLITS)
    tl.store(largest + row, best)
    if DRAWS:
        inverse = tl.load(values + line * 4).to(tl.float32)
        if inverse != 0.0:
            if KIND == 2:
                thresholds += num_rows
                totals += num_rows * SPLITS
            ends = tl.cumsum(tl.load(totals + row * SPLITS + tl.arange(0, SPLITS)), axis=0)
            total = tl.max(ends, axis=0)
            uniform = uniform_of(tl.load(seeds + line).to(tl.uint64), tl.load(counters + row).to(tl.uint64))
            rank = tl.maximum(tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1), 0)
            split = tl.minimum(tl.sum((ends <= rank).to(tl.int32), axis=0), SPLITS - 1)
            sum_before = tl.max(tl.where(ends <= rank, ends, 0), axis=0)
            low, least = tl.load(thresholds + row), tl.load(values + line * 4 + 3).to(tl.float32)
            token = split.to(tl.int64) * chunk
            x += row * x_stride
            for start in range(split * chunk, tl.minimum(split * chunk + chunk, width), BLOCK):
                i = start + tl.arange(0, BLOCK)
                value = tl.load(x + i, mask=i < width, other=float("-inf")).to(tl.float32)
                weight = weight_of(value, best, inverse, least, ordered(value), low)
                token += tl.sum(((sum_before + tl.cumsum(weight, axis=0) <= rank) & (i < width)).to(tl.int64), axis=0)
                sum_before += tl.sum(weight, axis=0)
    tl.store(tokens + row, tl.minimum(token, width - 1))


def sample(
    logits: torch.Tensor, rows: torch.Tensor, num_tokens: torch.Tensor, knobs: Knobs, *,
    any_drawn: bool = True, any_top_k: bool = True, any_top_p: bool = True, splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As in the package; `splits` instead of the table's parts of a row, a power of two."""
    (num_rows, width), device = logits.shape, logits.device
    splits = splits or num_splits(num_rows, width, num_processors(device))
    chunk = triton.cdiv(triton.cdiv(width, splits), BLOCK) * BLOCK
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    best = torch.empty(num_rows, dtype=torch.float32, device=device)
    if not num_rows:
        return tokens, best
    kind = _TOP_P if any_drawn and any_top_p else 0
    maxima, thresholds, totals = (
        torch.empty(size, dtype=torch.int64, device=device)
        for size in (num_rows * splits, 2 * num_rows, 2 * num_rows * splits)
    )
    row, sizes = (logits, rows, knobs.values, maxima), (logits.stride(0), width, chunk)
    grid, cut = (num_rows, splits), {"SPLITS": splits, "BLOCK": BLOCK}
    maxima_of[grid](maxima, logits, *sizes, **cut)
    if any_drawn:
        sums = torch.empty(2 * num_rows * splits * 16, dtype=torch.int64, device=device)
        lows = torch.empty(_STEPS * num_rows, dtype=torch.int64, device=device)
        for wanted, of in ((any_top_k, _TOP_K), (any_top_p, _TOP_P)):
            for step in range(_STEPS if wanted else 0):
                narrow[grid](
                    sums, lows, totals, thresholds, *row, *sizes, step, num_rows, KIND=of, SPLITS=splits, BLOCK=COUNTED
                )
            if wanted or of == _TOP_K:
                tally[grid](totals, thresholds, sums, lows, *row, *sizes, num_rows, KIND=of if wanted else 0, **cut)
    pick[(num_rows,)](
        tokens, best, totals, thresholds, logits, rows, num_tokens, knobs.seeds, knobs.values, maxima, *sizes, num_rows,
        DRAWS=any_drawn, KIND=kind, **cut,
    )  # fmt: skip
    return tokens, best


@triton.jit(do_not_specialize=("num_rows",))
def hand_out(tokens, largest, rows, num_tokens, token_ids, out, num_rows, line_stride, ROWS: tl.constexpr):
    """Tokens to their lines, and both columns to the host's copy."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    token = tl.load(tokens + row, mask=is_row, other=0).to(tl.int32)
    best = tl.load(largest + row, mask=is_row, other=0.0)
    line, position = tl.load(rows + row, mask=is_row, other=0), tl.load(num_tokens + row, mask=is_row, other=0)
    tl.store(token_ids + line * line_stride + position, token, mask=is_row)
    tl.store(out + row, token, mask=is_row)
    tl.store(out + num_rows + row, best.to(tl.int32, bitcast=True), mask=is_row)


def deliver(
    tokens: torch.Tensor, best: torch.Tensor, rows: torch.Tensor, num_tokens: torch.Tensor, token_ids: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """As in the package."""
    if len(tokens):
        hand_out[(triton.cdiv(len(tokens), 128),)](
            tokens, best, rows, num_tokens, token_ids, out, len(tokens), token_ids.stride(0), ROWS=128
        )
    return out
