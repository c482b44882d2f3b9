"""A block of tokens a program, which finds its tokens' rows by adding the counts up: a few hundred cached numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from llmd_kernels.prepare_batch import DecodeInputs, StepInputs

_BLOCK = 64  # tokens
_ROWS = 128  # rows looked at together


@triton.jit(do_not_specialize=("num_tokens", "num_rows", "pad_slot"))
def prepare(
    input_ids, positions, slots, token_rows, seq_lens, query_start, columns, token_ids, block_table, num_tokens, num_rows,
    line_stride, table_stride, block_size, pad_slot, HAS_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All columns of one block of tokens; the first program also writes what there is of each row."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at, begin = tl.zeros((BLOCK,), dtype=tl.int32), tl.zeros((BLOCK,), dtype=tl.int64)
    total = tl.zeros((), dtype=tl.int64)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        is_row = row < num_rows
        counts = tl.load(columns + 2 * num_rows + row, mask=is_row, other=0)
        ends = total + tl.cumsum(counts, axis=0)
        is_before = (ends[None, :] <= token[:, None]) & is_row[None, :]
        at += tl.sum(is_before.to(tl.int32), axis=1)
        begin = tl.maximum(begin, tl.max(tl.where(is_before, ends[None, :], 0), axis=1))
        total += tl.sum(counts, axis=0)
        if tl.program_id(0) == 0:
            starts = tl.load(columns + num_rows + row, mask=is_row, other=0)
            tl.store(seq_lens + row, (starts + counts).to(tl.int32), mask=is_row)
            tl.store(query_start + 1 + row, ends.to(tl.int32), mask=is_row)
    if tl.program_id(0) == 0:
        tl.store(query_start, 0)
    is_token, is_place = token < total, token < num_tokens
    line = tl.load(columns + at, mask=is_token, other=0)
    start = tl.load(columns + num_rows + at, mask=is_token, other=0)
    position = tl.where(is_token, start + token - begin, 0)
    tl.store(token_rows + token, line, mask=is_place)
    tl.store(positions + token, position, mask=is_place)
    token_id = tl.load(token_ids + line * line_stride + position, mask=is_token, other=0)
    tl.store(input_ids + token, token_id.to(tl.int64), mask=is_place)
    if HAS_BLOCKS:
        block = tl.load(block_table + line * table_stride + position // block_size, mask=is_token, other=0).to(tl.int64)
        slot = tl.where(is_token, block * block_size + position % block_size, pad_slot)
        tl.store(slots + token, slot, mask=is_place)


def prepare_batch(
    out: StepInputs, columns: torch.Tensor, token_ids: torch.Tensor, block_table: torch.Tensor | None, block_size: int,
    pad_slot: int,
) -> None:  # fmt: skip
    """As in the package."""
    num_tokens, num_rows = len(out.input_ids), columns.shape[1]
    table = columns if block_table is None else block_table
    prepare[(max(1, triton.cdiv(num_tokens, _BLOCK)),)](
        *out, columns, token_ids, table, num_tokens, num_rows, token_ids.stride(0), table.stride(0), block_size, pad_slot,
        HAS_BLOCKS=block_table is not None, BLOCK=_BLOCK, ROWS=_ROWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=("num_rows", "column_stride"))
def decode_inputs(
    input_ids, slots, seq_lens, num_tokens, columns, token_ids, block_table, num_rows, column_stride, line_stride,
    table_stride, block_size, HAS_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All columns of some rows, a row a thread."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    line = tl.load(columns + row, mask=is_row, other=0)
    position = tl.load(columns + column_stride + row, mask=is_row, other=0)
    token_id = tl.load(token_ids + line * line_stride + position, mask=is_row, other=0)
    tl.store(input_ids + row, token_id.to(tl.int64), mask=is_row)
    tl.store(num_tokens + row, position + 1, mask=is_row)
    tl.store(seq_lens + row, (position + 1).to(tl.int32), mask=is_row)
    if HAS_BLOCKS:
        place = block_table + line * table_stride + position // block_size
        came = tl.load(columns + 2 * column_stride + row, mask=is_row, other=-1)
        known = tl.load(place, mask=is_row & (came < 0), other=0).to(tl.int64)
        block = tl.where(came < 0, known, came)
        tl.store(place, block.to(tl.int32), mask=is_row & (came >= 0))
        tl.store(slots + row, block * block_size + position % block_size, mask=is_row)


def prepare_decode(
    out: DecodeInputs, columns: torch.Tensor, token_ids: torch.Tensor, block_table: torch.Tensor | None, block_size: int
) -> None:
    """As in the package."""
    num_rows = columns.shape[1]
    if not num_rows:
        return
    table = columns if block_table is None else block_table
    decode_inputs[(triton.cdiv(num_rows, _ROWS),)](
        *out, columns, token_ids, table, num_rows, columns.stride(0), token_ids.stride(0), table.stride(0), block_size,
        HAS_BLOCKS=block_table is not None, ROWS=_ROWS,
    )  # fmt: skip
