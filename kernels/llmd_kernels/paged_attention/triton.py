"""Paged attention on a GPU: decode in splits that a second kernel joins, prefill in blocks of queries.

Both fold the query heads of a KV head into the rows of one tile, so that tl.dot has at least 16 of them. Rows with one token
in the step are decode's, all others prefill's; each kernel's programs leave the other's rows at once, so that no length is
ever known on the host and a captured graph serves any.

    decode   grid rows × KV heads × splits      a share of what a row sees → partial O, maximum, sum
    join     grid rows × heads                  partial results → out
    prefill  grid blocks of queries × KV heads  as many blocks as tokens and rows can need
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from llmd_kernels.paged_attention import table
from llmd_kernels.paged_attention.call import AttentionCall
from llmd_kernels.quantized_kv.triton import kernel_view, widen

_LENGTHS = ("num_rows", "num_tokens")
_MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def tile_of_scores(
    q, keys, key_scales, offsets, scale_offsets, n, real, visible, position, slope, scale, soft_cap, head_dim,
    KIND: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 of q [M, D] against the positions n [N]; what is not `visible` [M, N] is far below all others."""
    d = tl.arange(0, BLOCK_D)
    k = tl.load(keys + offsets[None, :] + d[:, None], mask=(d < head_dim)[:, None] & real[None, :], other=0)
    if KIND != 0:
        k = widen(k, KIND).to(q.dtype)  # exact: eight bits fit every float
    s = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
    if KIND != 0:
        bits = tl.load(key_scales + scale_offsets, mask=real, other=0).to(tl.int32)
        s *= (bits << 16).to(tl.float32, bitcast=True)[None, :]
    if HAS_CAP:
        s = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * s / soft_cap)))
    if HAS_ALIBI:
        s -= slope[:, None] * (position[:, None] - n[None, :]).to(tl.float32)
    return tl.where(visible, s * 1.4426950408889634, -1e30)


@triton.jit
def tile_of_values(
    values, value_scales, offsets, scale_offsets, real, head_dim, dtype, KIND: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Values [N, D] in the dtype of the products, zero where there is no position."""
    d = tl.arange(0, BLOCK_D)
    v = tl.load(values + offsets[:, None] + d[None, :], mask=real[:, None] & (d < head_dim)[None, :], other=0)
    if KIND != 0:
        bits = tl.load(value_scales + scale_offsets, mask=real, other=0).to(tl.int32)
        v = widen(v, KIND) * (bits << 16).to(tl.float32, bitcast=True)[:, None]
    return v.to(dtype)


@triton.jit
def attend_span(
    q, cache, scales, blocks, lowest, begin, end, position, slope, head, scale, soft_cap, window, top, total,
    mixed, head_dim, kv_heads, v_offset, block_stride, token_stride, scale_v_offset, scale_stride,
    KIND: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Positions [begin, end) of one KV head into the running maxima [M], sums [M] and mixed values [M, D] of q [M, D].

    Nothing below `lowest` is read: what a window has left behind may be another sequence's by now.
    """
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        real = (n >= lowest) & (n < end)
        block = tl.load(blocks + n // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
        offsets = block * block_stride + (n % BLOCK_SIZE) * token_stride + head * head_dim
        scale_offsets = block * scale_stride + (n % BLOCK_SIZE) * kv_heads + head
        distance = position[:, None] - n[None, :]
        visible = (distance >= 0) & (distance < window) & real[None, :]
        s = tile_of_scores(
            q, cache, scales, offsets, scale_offsets, n, real, visible, position, slope, scale, soft_cap, head_dim,
            KIND, HAS_CAP, HAS_ALIBI, BLOCK_D,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, axis=1))
        shrink = tl.exp2(top - higher)
        p = tl.where(visible, tl.exp2(s - higher[:, None]), 0.0)
        v = tile_of_values(
            cache + v_offset, scales + scale_v_offset, offsets, scale_offsets, real, head_dim, q.dtype, KIND, BLOCK_D
        )
        mixed = mixed * shrink[:, None] + tl.dot(p.to(q.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(p, axis=1)
        top = higher
    return top, total, mixed


@triton.jit
def decode(
    out, tops, totals, q, cache, scales, block_table, rows, query_start, seq_lens, sinks, slopes, scale, soft_cap, window,
    heads, kv_heads, head_dim, q_stride, table_stride, v_offset, block_stride, token_stride, scale_v_offset, scale_stride,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, KIND: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial results out [R, H, S, D] float32, tops and totals [R, H, S] of rows with one token in this step."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(query_start + row)
    if tl.load(query_start + row + 1) - token != 1:
        return
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    of_group = m < GROUP
    query_head = head * GROUP + m
    q_line = q + token.to(tl.int64) * q_stride + query_head[:, None] * head_dim + d[None, :]
    queries = tl.load(q_line, mask=of_group[:, None] & (d < head_dim)[None, :], other=0.0)
    length = tl.load(seq_lens + row)
    lowest = tl.maximum(length - window, 0)
    first = lowest // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(length - first, BLOCK_N), SPLITS) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    slope = total
    if HAS_SINKS:  # counted once
        sink = tl.load(sinks + query_head, mask=of_group, other=0.0) * 1.4426950408889634
        top = tl.where(split == 0, sink, top)
        total += tl.where(split == 0, 1.0, 0.0)
    if HAS_ALIBI:
        slope = tl.load(slopes + query_head, mask=of_group, other=0.0)
    blocks = block_table + tl.load(rows + row) * table_stride
    position = tl.zeros((BLOCK_M,), tl.int32) + (length - 1)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top, total, mixed = attend_span(
        queries, cache, scales, blocks, lowest, begin, end, position, slope, head, scale, soft_cap, window, top, total,
        mixed, head_dim, kv_heads, v_offset, block_stride, token_stride, scale_v_offset, scale_stride,
        KIND, HAS_CAP, HAS_ALIBI, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    place = (row.to(tl.int64) * heads + query_head) * SPLITS + split
    tl.store(tops + place, top, mask=of_group)
    tl.store(totals + place, total, mask=of_group)
    tl.store(out + place[:, None] * head_dim + d[None, :], mixed, mask=of_group[:, None] & (d < head_dim)[None, :])


@triton.jit
def join(out, parts, tops, totals, query_start, heads, head_dim, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Out [T, H, D] of the rows that decode computed, from their parts [R, H, S, D]."""
    row, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(query_start + row)
    if tl.load(query_start + row + 1) - token != 1:
        return
    s, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    place = (row.to(tl.int64) * heads + head) * SPLITS + s
    top = tl.load(tops + place)
    weight = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(tl.load(totals + place) * weight, axis=0)
    some = tl.load(parts + place[:, None] * head_dim + d[None, :], mask=(d < head_dim)[None, :], other=0.0)
    mixed = tl.sum(some * weight[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    line = out + (token.to(tl.int64) * heads + head) * head_dim + d
    tl.store(line, mixed.to(out.dtype.element_ty), mask=d < head_dim)


@triton.jit(do_not_specialize=_LENGTHS)
def prefill(
    out, q, cache, scales, block_table, rows, query_start, seq_lens, sinks, slopes, scale, soft_cap, window, num_rows,
    heads, kv_heads, head_dim, q_stride, table_stride, v_offset, block_stride, token_stride, scale_v_offset, scale_stride,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, KIND: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Out [T, H, D] of rows with several tokens in this step: BLOCK_Q queries with the heads of a KV head a program."""
    block, head = tl.program_id(0), tl.program_id(1)
    low, high = num_rows * 0, num_rows
    while high - low > 1:  # the row that this block of queries is of: row i's begin at block query_start[i] // BLOCK_Q + i
        middle = (low + high) // 2
        is_before = tl.load(query_start + middle) // BLOCK_Q + middle <= block
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    start = tl.load(query_start + low)
    count = tl.load(query_start + low + 1) - start
    query_at = (block - start // BLOCK_Q - low) * BLOCK_Q
    if (query_at >= count) | (count == 1):
        return
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query, query_head = query_at + m // GROUP, head * GROUP + m % GROUP
    is_query = (m < BLOCK_Q * GROUP) & (query < count)
    mask = is_query[:, None] & (d < head_dim)[None, :]
    token = (start + query).to(tl.int64)
    queries = tl.load(q + token[:, None] * q_stride + query_head[:, None] * head_dim + d[None, :], mask=mask, other=0.0)
    length = tl.load(seq_lens + low)
    before = length - count
    position = tl.where(is_query, before + query, before + query_at)
    lowest = tl.maximum(before + query_at - window + 1, 0)
    begin = lowest // BLOCK_N * BLOCK_N
    end = tl.minimum(before + query_at + BLOCK_Q, length)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    slope = total
    if HAS_SINKS:
        top = tl.load(sinks + query_head, mask=is_query, other=0.0) * 1.4426950408889634
        total += 1.0
    if HAS_ALIBI:
        slope = tl.load(slopes + query_head, mask=is_query, other=0.0)
    blocks = block_table + tl.load(rows + low) * table_stride
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top, total, mixed = attend_span(
        queries, cache, scales, blocks, lowest, begin, end, position, slope, head, scale, soft_cap, window, top, total,
        mixed, head_dim, kv_heads, v_offset, block_stride, token_stride, scale_v_offset, scale_stride,
        KIND, HAS_CAP, HAS_ALIBI, BLOCK_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    line = out + (token[:, None] * heads + query_head[:, None]) * head_dim + d[None, :]
    tl.store(line, mixed.to(out.dtype.element_ty), mask=mask)


def paged_attention(call: AttentionCall, splits: int | None = None, device: str | None = None) -> torch.Tensor:
    """As in the package. `splits` and `device` (sm_90 …) are found out where they are not given.

    Raises ValueError for dtypes and shapes that the kernels do not serve, before anything is launched.
    """
    check(call)
    q, (cache, scales, kind) = call.q, kernel_view(call.kv)
    num_tokens, heads, head_dim = q.shape
    num_rows, kv_heads, block_size = call.rows.shape[0], cache.shape[3], cache.shape[2]
    device = device or device_name(q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    window = call.window or 1 << 30
    rows_of_step = (call.block_table, call.rows, call.query_start, call.seq_lens)
    extras = (_or(call.sinks, q), _or(call.alibi_slopes, q), call.scale, call.soft_cap or 0.0, window)
    strides = (
        heads, kv_heads, head_dim, q.stride(0), call.block_table.stride(0), cache.stride(1), cache.stride(0),
        cache.stride(2), scales.stride(1) if kind else 0, scales.stride(0) if kind else 0,
    )  # fmt: skip
    flags: dict[str, Any] = {
        "GROUP": heads // kv_heads, "KIND": kind, "HAS_CAP": call.soft_cap is not None, "HAS_SINKS": call.sinks is not None,
        "HAS_ALIBI": call.alibi_slopes is not None, "BLOCK_SIZE": block_size, "BLOCK_D": block_d,
    }  # fmt: skip
    if call.max_query_len > 1:
        shape = _fitting(table.tiles(device, block_d, is_prefill=True), heads // kv_heads)
        block_q = shape.block_m // (heads // kv_heads)
        prefill[(num_tokens // block_q + num_rows, kv_heads)](
            out, q, cache, scales, *rows_of_step, *extras, num_rows, *strides, BLOCK_Q=block_q, **flags, **_meta(shape)
        )
    if call.max_query_len == 1 or num_rows > 1:
        shape = _fitting(table.tiles(device, block_d, is_prefill=False), heads // kv_heads)
        splits = splits or table.num_splits(num_rows * kv_heads, num_processors(q.device))
        parts = torch.empty(num_rows, heads, splits, head_dim, dtype=torch.float32, device=q.device)
        tops, totals = torch.empty(2, num_rows, heads, splits, dtype=torch.float32, device=q.device)
        decode[(num_rows, kv_heads, splits)](
            parts, tops, totals, q, cache, scales, *rows_of_step, *extras, *strides, SPLITS=splits, **flags, **_meta(shape)
        )
        join[(num_rows, heads)](out, parts, tops, totals, call.query_start, heads, head_dim, SPLITS=splits, BLOCK_D=block_d)
    return out


def check(call: AttentionCall) -> None:
    """Raise ValueError with the reason if the kernels cannot serve a call."""
    q, (cache, _, kind) = call.q, kernel_view(call.kv)
    if q.dtype not in _DTYPES or (not kind and cache.dtype not in _DTYPES):
        raise ValueError(f"q and a plain cache must be float32, float16 or bfloat16, got {q.dtype} and {cache.dtype}")
    if q.shape[2] > _MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {_MAX_HEAD_DIM}, got {q.shape[2]}")
    if q.stride(2) != 1 or q.stride(1) != q.shape[2] or cache.stride(3) != q.shape[2]:
        raise ValueError(f"heads must be dense: strides of q {q.stride()}, of the cache {cache.stride()}")
    if len(call.query_start) != len(call.rows) + 1 or len(call.seq_lens) != len(call.rows):
        raise ValueError(f"{len(call.rows)} rows, but {len(call.query_start)} starts and {len(call.seq_lens)} lengths")


def device_name(device: torch.device) -> str:
    """As compilers name it: sm_90, gfx942; cpu where there is none."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _fitting(shape: table.Tiles, group: int) -> table.Tiles:
    """Tiles with room for all query heads of a KV head."""
    return shape._replace(block_m=max(shape.block_m, triton.next_power_of_2(group)))


def _meta(shape: table.Tiles) -> dict[str, int]:
    return {
        "BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n, "num_warps": shape.num_warps, "num_stages": shape.num_stages,
    }  # fmt: skip


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that is never read stands in for none."""
    return other if tensor is None else tensor
