"""Paged attention on a GPU: decode in equal shares of all that is to be read, prefill in blocks of queries.

Both fold the query heads of a KV head into one tile. Rows with one token in the step are decode's, all others prefill's:
each kernel leaves the other's rows alone. No length is ever known on the host, so that a captured graph serves any.

    decode   grid as many programs as the device holds   the tiles of all rows and KV heads in a row, in equal shares
    prefill  grid blocks of queries × KV heads           as many blocks as tokens and rows can need, the last, longest first

A share of decode may begin and end inside a row. What several programs computed of a row and head is joined by the one of
them that is done last, always in the same order, so that it does not matter which it is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from llmd_kernels.gpu import device_name, num_processors
from llmd_kernels.paged_attention import table
from llmd_kernels.paged_attention.call import AttentionCall
from llmd_kernels.paged_attention.triton_span import attend_span, prepared
from llmd_kernels.quantized_kv.triton import ONE_BY_ONE, kernel_view
from llmd_kernels.triton_barrier import full_barrier

_LOG2E = 1.4426950408889634
_LENGTHS = ("num_rows", "window")
_COLUMNS = ("block_table", "rows", "query_start", "seq_lens")  # of a step: wherever they lie, no kernel is compiled anew
_MAX_HEAD_DIM = 256
_ALL = 1 << 30  # positions: a window that hides none
_MAX_COUNTERS = 1 << 16
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def tiles_of(rows, query_start, seq_lens, num_rows, window, BLOCK_N: tl.constexpr):
    """Tiles of each KV head of `rows` in decode: none for prefill's rows, else at least one."""
    real = rows < num_rows
    count = tl.load(query_start + rows + 1, mask=real, other=0) - tl.load(query_start + rows, mask=real, other=0)
    length = tl.load(seq_lens + rows, mask=real, other=0)
    return tl.where(count == 1, tl.maximum(tl.cdiv(tl.minimum(length, window), BLOCK_N), 1), 0)


@triton.jit
def joined(
    parts, tops, totals, first, last, is_cut, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The mixed values [G, D] that the parts of programs `first` to `last` make.

    What a program begins with lies at twice its number, what it ends with one further; `is_cut` is 1 if `first` had begun
    with something else. Read past the first cache, which may hold an earlier launch's.
    """
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    top = tl.full((BLOCK_G,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    mixed = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in tl.range(first, last + 1, PARTS):
        program = start + tl.arange(0, PARTS)
        line = (2 * program + tl.where(program == first, is_cut, 0))[:, None] * GROUP + g[None, :]
        mask = (program <= last)[:, None] & (g < GROUP)[None, :]
        tops_here = tl.load(tops + line, mask=mask, other=-1e30, cache_modifier=".cg")
        totals_here = tl.load(totals + line, mask=mask, other=0.0, cache_modifier=".cg")
        dims = mask[:, :, None] & (d < HEAD_DIM)[None, None, :]
        some = tl.load(parts + line[:, :, None] * HEAD_DIM + d[None, None, :], mask=dims, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(tops_here, axis=0))
        weight, shrink = tl.exp2(tops_here - higher[None, :]), tl.exp2(top - higher)
        top = higher
        total = total * shrink + tl.sum(totals_here * weight, axis=0)
        mixed = mixed * shrink[:, None] + tl.sum(some * weight[:, :, None], axis=0)
    return mixed / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_COLUMNS)
def decode(
    out, parts, tops, totals, done, q, cache, scales, block_table, rows, query_start, seq_lens, sinks, slopes, factor,
    soft_cap, window, num_rows, q_stride, table_stride, MAX_ROWS: tl.constexpr, LEAST: tl.constexpr, MAX_PARTS: tl.constexpr,
    PARTS: tl.constexpr, HAS_SINKS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    READ: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, V_OFFSET: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    SCALE_V_OFFSET: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Out [T, H, D] of rows with one token in this step.

    parts [2 · programs, GROUP, D], tops and totals [2 · programs, GROUP] are float32; done [rows, KV heads] int32 counts the
    programs that have left their parts, and is zero before and after.
    """
    program = tl.program_id(0)
    tiles = tiles_of(tl.arange(0, MAX_ROWS), query_start, seq_lens, num_rows, window, BLOCK_N)
    until = tl.cumsum(tiles, 0) * KV_HEADS
    share = tl.cdiv(tl.max(until, 0), tl.num_programs(0))
    share = tl.maximum(tl.maximum(share, LEAST), tl.cdiv(tl.max(tiles, 0), MAX_PARTS))
    begin = program * share
    end = tl.minimum(begin + share, tl.max(until, 0))
    m, d, g = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    is_head = tl.expand_dims(m < GROUP, 1 - HEADS)
    mask = is_head & tl.expand_dims(d < HEAD_DIM, HEADS)
    at = begin
    while at < end:
        is_past = until <= at
        row = tl.sum(is_past.to(tl.int32), 0)
        first = tl.max(tl.where(is_past, until, 0), 0)  # of the row's tiles
        token, length = tl.load(query_start + row).to(tl.int64), tl.load(seq_lens + row)
        lowest = tl.maximum(length - window, 0)
        count = tl.maximum(tl.cdiv(length - lowest, BLOCK_N), 1)
        head = (at - first) // count
        first += head * count  # and now of the head's
        upto = tl.minimum(end, first + count)
        query_head = head * GROUP + m
        elements = tl.expand_dims(query_head * HEAD_DIM, 1 - HEADS) + tl.expand_dims(d, HEADS)
        queries = tl.load(q + token * q_stride + elements, mask=mask, other=0.0)
        row_factor, queries = prepared(queries, factor, KIND, 1 - HEADS)
        top = tl.full((BLOCK_M,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        slope = total
        if HAS_SINKS:  # counted once
            sink = tl.load(sinks + query_head, mask=m < GROUP, other=0.0) * 1.4426950408889634
            top = tl.where(at == first, sink, top)
            total += tl.where(at == first, 1.0, 0.0)
        if HAS_ALIBI:
            slope = tl.load(slopes + query_head, mask=m < GROUP, other=0.0) * 1.4426950408889634
        position = tl.zeros((BLOCK_M,), tl.int32) + (length - 1)
        mixed = tl.zeros((BLOCK_D, BLOCK_M) if HEADS == 1 else (BLOCK_M, BLOCK_D), tl.float32)
        top, total, mixed = attend_span(
            queries, cache, scales, block_table + tl.load(rows + row) * table_stride, lowest + (at - first) * BLOCK_N,
            tl.minimum(lowest + (upto - first) * BLOCK_N, length), 0, 0, position, slope, head, row_factor, soft_cap, window,
            top, total, mixed, False, HEADS, KIND, READ, HAS_CAP, HAS_ALIBI, BLOCK_SIZE, KV_HEADS, BLOCK_STRIDE,
            TOKEN_STRIDE, V_OFFSET, SCALE_STRIDE, SCALE_V_OFFSET, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        line = out + token * (KV_HEADS * GROUP * HEAD_DIM)
        if upto - at == count:
            mixed /= tl.expand_dims(tl.where(total > 0.0, total, 1.0), 1 - HEADS)
            tl.store(line + elements, mixed.to(out.dtype.element_ty), mask=mask)
        else:
            place = (2 * program + (at != begin).to(tl.int32)) * GROUP + m
            tl.store(tops + place, top, mask=m < GROUP)
            tl.store(totals + place, total, mask=m < GROUP)
            values = tl.expand_dims(place * HEAD_DIM, 1 - HEADS) + tl.expand_dims(d, HEADS)
            tl.store(parts + values, mixed, mask=mask)
            full_barrier()  # all threads have stored before one of them says so
            counter = done + row * KV_HEADS + head
            num_done = tl.atomic_add(counter, 1, sem="acq_rel")
            one, other = first // share, (first + count - 1) // share  # the programs that have a part
            if num_done == other - one:
                tl.store(counter, 0)
                is_cut = (first != one * share).to(tl.int32)
                whole = joined(parts, tops, totals, one, other, is_cut, GROUP, HEAD_DIM, BLOCK_G, BLOCK_D, PARTS)
                of_group = (head * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
                is_real = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
                tl.store(line + of_group, whole.to(out.dtype.element_ty), mask=is_real)
        at = upto


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=_COLUMNS)
def prefill(
    out, q, cache, scales, block_table, rows, query_start, seq_lens, sinks, slopes, factor, soft_cap, window, num_rows,
    q_stride, table_stride, BLOCK_Q: tl.constexpr, HAS_SINKS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, READ: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr, BLOCK_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, V_OFFSET: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, SCALE_V_OFFSET: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Out [T, H, D] of rows with several tokens in this step: BLOCK_Q queries with the heads of a KV head a program."""
    head, block = tl.program_id(0) % KV_HEADS, (tl.num_programs(0) - 1 - tl.program_id(0)) // KV_HEADS
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
    mask = is_query[:, None] & (d < HEAD_DIM)[None, :]
    token = (start + query).to(tl.int64)
    queries = tl.load(q + token[:, None] * q_stride + query_head[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    row_factor, queries = prepared(queries, factor, KIND, 1 - HEADS)
    length = tl.load(seq_lens + low)
    first = length - count + query_at  # position of the first query
    last = tl.minimum(first + BLOCK_Q, length) - 1
    position = tl.where(is_query, length - count + query, first)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    slope = total
    if HAS_SINKS:
        top = tl.load(sinks + query_head, mask=is_query, other=0.0) * 1.4426950408889634
        total += 1.0
    if HAS_ALIBI:
        slope = tl.load(slopes + query_head, mask=is_query, other=0.0) * 1.4426950408889634
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top, total, mixed = attend_span(
        queries, cache, scales, block_table + tl.load(rows + low) * table_stride, tl.maximum(first - window + 1, 0),
        last + 1, last - window + 1, first + 1, position, slope, head, row_factor, soft_cap, window, top, total, mixed, True,
        HEADS, KIND, READ, HAS_CAP, HAS_ALIBI, BLOCK_SIZE, KV_HEADS, BLOCK_STRIDE, TOKEN_STRIDE, V_OFFSET, SCALE_STRIDE,
        SCALE_V_OFFSET, HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    line = out + (token[:, None] * (KV_HEADS * GROUP) + query_head[:, None]) * HEAD_DIM + d[None, :]
    tl.store(line, mixed.to(out.dtype.element_ty), mask=mask)


def paged_attention(call: AttentionCall, programs: int | None = None, device: str | None = None) -> torch.Tensor:
    """As in the package. `programs` of decode and `device` (sm_90 …) are found out where they are not given.

    Raises ValueError for dtypes and shapes that the kernels do not serve, before anything is launched.
    """
    check(call)
    device = device or device_name(call.q.device)
    out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    given, flags = arguments(call, device)
    if call.max_query_len > 1:
        shape = table.tiles(device, flags["BLOCK_D"], is_prefill=True)
        if flags["READ"] != ONE_BY_ONE:  # numbers are made in registers
            shape = shape._replace(block_m=min(shape.block_m, table.MOST_IN_WORDS // flags["BLOCK_D"]), num_warps=8)
        shape = table.fitted(shape, flags["GROUP"], is_wide=_is_wide(given))
        block_q = shape.block_m // flags["GROUP"]
        prefill[(flags["KV_HEADS"] * (call.q.shape[0] // block_q + call.rows.shape[0]),)](
            out, *given, BLOCK_Q=block_q, HEADS=0, **flags, **_meta(shape)
        )
    if call.max_query_len == 1 or call.rows.shape[0] > 1:
        _decode(out, given, flags, device, programs)
    return out


def _decode(
    out: torch.Tensor, given: tuple[Any, ...], flags: dict[str, Any], device: str, programs: int | None
) -> None:  # fmt: skip
    are_columns, group, num_rows = flags["READ"] != ONE_BY_ONE, flags["GROUP"], given[4].shape[0]
    shape = table.tiles(device, flags["BLOCK_D"], is_prefill=False)
    shape = table.fitted(shape, group, heads_are_columns=are_columns, is_wide=_is_wide(given))
    programs = programs or shape.programs * num_processors(out.device)
    parts = torch.empty(2 * programs, group, flags["HEAD_DIM"], dtype=torch.float32, device=out.device)
    tops, totals = torch.empty(2, 2 * programs, group, dtype=torch.float32, device=out.device)
    limits = {"maxnreg": table.registers(shape)} if device.startswith("sm_") else {}
    block_g = triton.next_power_of_2(group)
    decode[(programs,)](
        out, parts, tops, totals, _counters(out.device), *given, HEADS=int(are_columns), BLOCK_G=block_g,
        LEAST=table.LEAST_TILES, MAX_ROWS=max(table.MAX_ROWS, triton.next_power_of_2(num_rows)), MAX_PARTS=table.MAX_PARTS,
        PARTS=max(1, table.JOINED // (block_g * flags["BLOCK_D"])), **flags, **_meta(shape), **limits,
    )  # fmt: skip


def arguments(call: AttentionCall, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What both kernels are given after their results, and the compile-time constants."""
    q, sm = call.q, int(device[3:]) if device.startswith("sm_") and call.q.dtype != torch.float32 else None
    cache, scales, kind, read = kernel_view(call.kv, sm)
    kv_heads, head_dim = call.kv.shape[3:]
    factor, cap = call.scale * _LOG2E, call.soft_cap
    if cap is not None:
        factor *= 2 / cap  # of a tanh by exp2
    given = (
        q, cache, scales, call.block_table, call.rows, call.query_start, call.seq_lens, _or(call.sinks, q),
        _or(call.alibi_slopes, q), factor, (cap or 0.0) * _LOG2E, min(call.window or _ALL, _ALL), call.rows.shape[0],
        q.stride(0), call.block_table.stride(0),
    )  # fmt: skip
    return given, {
        "GROUP": q.shape[1] // kv_heads, "KIND": kind, "READ": read, "HAS_CAP": cap is not None,
        "HAS_SINKS": call.sinks is not None, "HAS_ALIBI": call.alibi_slopes is not None, "BLOCK_SIZE": call.kv.shape[2],
        "KV_HEADS": kv_heads, "BLOCK_STRIDE": cache.stride(0), "TOKEN_STRIDE": cache.stride(2), "V_OFFSET": cache.stride(1),
        "SCALE_STRIDE": scales.stride(0) if kind else 0, "SCALE_V_OFFSET": scales.stride(1) if kind else 0,
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }  # fmt: skip


def check(call: AttentionCall) -> None:
    """Raise ValueError with the reason if the kernels cannot serve a call."""
    if call.q.dim() != 3 or call.kv.shape[1] != 2 or len(call.kv.shape) != 5:
        raise ValueError(
            f"q must be [T, H, D] and a cache [blocks, 2, tokens, K, D], got {call.q.shape} and {call.kv.shape}"
        )
    q, (cache, _, kind, _) = call.q, kernel_view(call.kv)
    if q.dtype not in _DTYPES or (not kind and cache.dtype not in _DTYPES):
        raise ValueError(f"q and a plain cache must be float32, float16 or bfloat16, got {q.dtype} and {cache.dtype}")
    if q.shape[2] > _MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {_MAX_HEAD_DIM}, got {q.shape[2]}")
    if q.stride(2) != 1 or q.stride(1) != q.shape[2] or cache.stride(3) != q.shape[2]:
        raise ValueError(f"heads must be dense: strides of q {q.stride()}, of the cache {cache.stride()}")
    num_rows = len(call.rows)
    if len(call.query_start) != num_rows + 1 or len(call.seq_lens) != num_rows:
        raise ValueError(f"{num_rows} rows, but {len(call.query_start)} starts and {len(call.seq_lens)} lengths")
    if any(column.stride(-1) != 1 for column in (call.rows, call.query_start, call.seq_lens, call.block_table)):
        raise ValueError("rows, query_start, seq_lens and the lines of block_table must be dense")
    if num_rows * cache.shape[3] > _MAX_COUNTERS:
        raise ValueError(f"at most {_MAX_COUNTERS} rows times KV heads, got {num_rows} times {cache.shape[3]}")
    if not call.scale > 0:
        raise ValueError(f"scale must be above 0, got {call.scale}")


@cache
def _counters(device: torch.device) -> torch.Tensor:
    """Zeros, which each launch leaves as it found them: launches on one device must follow one another."""
    return torch.zeros(_MAX_COUNTERS, dtype=torch.int32, device=device)


def _is_wide(given: tuple[Any, ...]) -> bool:
    """Whether queries or a plain cache are of 32 bits."""
    return any(tensor.dtype == torch.float32 for tensor in given[:2])


def _meta(shape: table.Tiles) -> dict[str, int]:
    return {
        "BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n, "num_warps": shape.num_warps, "num_stages": shape.num_stages,
    }  # fmt: skip


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that is never read stands in for none."""
    return other if tensor is None else tensor
