"""The loop that decode and prefill share: tiles of one KV head's positions into a running softmax.

Scores are in base 2. For each tile the block table says where its tokens lie; the loads of the next tiles' keys and values,
and of the table beyond, run while this one is computed (num_stages says how far ahead). Strides are compile-time constants:
an address then costs one multiplication, and values lie at a fixed distance from keys.

Numbers of eight bits are multiplied in float16, which holds them exactly: queries are brought to 1 at most row by row, the
weights of values are taken relative to the largest scale so far, `unit`, and both are made good in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmd_kernels.quantized_kv.triton import numbers, scale_at


@triton.jit
def prepared(q, factor, KIND: tl.constexpr, DIMS: tl.constexpr):
    """What makes raw scores those of base 2, and the queries q as they are multiplied; their dims are the axis DIMS."""
    by_row, multiplied = factor, q
    if KIND != 0 and q.dtype == tl.float32:
        by_row = factor + tl.max(q, axis=DIMS) * 0.0
    elif KIND != 0:
        wide = q.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide), axis=DIMS), 1e-30)
        by_row, multiplied = factor * largest, (wide / tl.expand_dims(largest, DIMS)).to(tl.float16)
    return by_row, multiplied


@triton.jit
def attend_span(
    q, cache, scales, blocks, begin, end, seen_from, seen_below, position, slope, head, factor, soft_cap, window, top, total,
    mixed, CAUSAL: tl.constexpr, HEADS: tl.constexpr, KIND: tl.constexpr, READ: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, V_OFFSET: tl.constexpr, SCALE_STRIDE: tl.constexpr, SCALE_V_OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Positions [begin, end) of one KV head into the running maxima [M], sums [M] and mixed values of the queries q.

    HEADS is the axis of M: 0 for q, mixed [M, D] and scores [M, N], 1 for q, mixed [D, M] and scores [N, M]. Nothing outside
    [begin, end) is read: it may be another sequence's. CAUSAL: each query sees up to its `position`, `window` positions at
    most, and all see all of a tile in [seen_from, seen_below); else all see all.
    """
    per_word: tl.constexpr = 1 if READ == 0 else 4
    d = tl.arange(0, BLOCK_D // per_word)
    is_dim = (d < HEAD_DIM // per_word)[None, :]
    by_row = factor if KIND == 0 else tl.expand_dims(factor, 1 - HEADS)
    unit = 1e-30
    for at in tl.range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        there = tl.minimum(n, end - 1).to(tl.uint32)  # what is past the end reads the last again
        block = tl.load(blocks + there // BLOCK_SIZE).to(tl.int64)
        within = (there % BLOCK_SIZE).to(tl.int32)
        keys = cache + head * (HEAD_DIM // per_word) + (block * BLOCK_STRIDE + within * TOKEN_STRIDE)[:, None] + d[None, :]
        if HEAD_DIM == BLOCK_D:
            k, v = tl.load(keys), tl.load(keys + V_OFFSET)
        else:
            k, v = tl.load(keys, mask=is_dim, other=0), tl.load(keys + V_OFFSET, mask=is_dim, other=0)
        k = numbers(k, q.dtype, KIND, READ)
        s = tl.dot(k, q, input_precision="ieee") if HEADS == 1 else tl.dot(q, tl.trans(k), input_precision="ieee")
        if KIND != 0:
            line, which = scales + block * SCALE_STRIDE, within * KV_HEADS + head
            s *= tl.expand_dims(scale_at(line, which, READ), HEADS)
        if HAS_CAP:
            s = soft_cap - 2.0 * soft_cap / (1.0 + tl.exp2(s * by_row))  # the factor has twice the cap's inverse
        elif HAS_ALIBI:
            s *= by_row
        distance = tl.expand_dims(position, 1 - HEADS) - tl.expand_dims(n, HEADS)
        if HAS_ALIBI:
            s -= tl.expand_dims(slope, 1 - HEADS) * distance.to(tl.float32)
        if not CAUSAL:
            s = tl.where(tl.expand_dims(n < end, HEADS), s, float("-inf"))
        elif (at < seen_from) | (at + BLOCK_N > seen_below):
            is_seen = distance.to(tl.uint32, bitcast=True) < window.to(tl.uint32)  # what comes later is far beyond
            s = tl.where(is_seen, s, float("-inf"))
        if HAS_CAP or HAS_ALIBI:
            higher = tl.maximum(top, tl.max(s, axis=1 - HEADS))
            p = tl.exp2(s - tl.expand_dims(higher, 1 - HEADS))
        else:
            higher = tl.maximum(top, tl.max(s, axis=1 - HEADS) * factor)
            p = tl.exp2(s * by_row - tl.expand_dims(higher, 1 - HEADS))
        shrink = tl.exp2(top - higher)
        top = higher
        total = total * shrink + tl.sum(p, axis=1 - HEADS)
        if KIND != 0:
            scale = scale_at(line + SCALE_V_OFFSET, which, READ)
            larger = tl.maximum(unit, tl.max(scale, axis=0))
            shrink *= unit / larger
            p *= tl.expand_dims(scale / larger, HEADS)
            unit = larger
        mixed *= tl.expand_dims(shrink, 1 - HEADS)
        v = numbers(v, q.dtype, KIND, READ)
        if HEADS == 1:
            mixed = tl.dot(tl.trans(v), p.to(q.dtype), mixed, input_precision="ieee")
        else:
            mixed = tl.dot(p.to(q.dtype), v, mixed, input_precision="ieee")
    if KIND != 0:
        mixed *= unit
    return top, total, mixed
