"""What a step's layers read, from the rows that persist on the device: one launch into buffers that stay where they are."""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmd_kernels.prepare_batch import reference


class StepInputs(NamedTuple):
    """Buffers for up to T tokens of R rows; a captured graph reads them."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slot_mapping: torch.Tensor  # [T] int64, block · block_size + offset; [0] where there is no block table
    token_rows: torch.Tensor  # [T] int64, each token's line in the persistent arrays
    seq_lens: torch.Tensor  # [R] int32, the row's tokens once this step is computed
    query_start: torch.Tensor  # [R + 1] int32, where a row's tokens begin among the T


def new_inputs(num_tokens: int, num_rows: int, device: torch.device, *, has_blocks: bool = True) -> StepInputs:
    """Buffers of these sizes; what lies in them means nothing."""
    sizes = (num_tokens, num_tokens, num_tokens if has_blocks else 0, num_tokens)
    tokens = (torch.empty(size, dtype=torch.int64, device=device) for size in sizes)
    rows = (torch.empty(size, dtype=torch.int32, device=device) for size in (num_rows, num_rows + 1))
    return StepInputs(*tokens, *rows)


def prepare_batch(
    out: StepInputs,
    columns: torch.Tensor,
    token_ids: torch.Tensor,
    block_table: torch.Tensor | None,
    block_size: int = 1,
    *,
    pad_slot: int = 0,
) -> None:
    """Write a step's inputs into `out`.

    columns [3, R] int64: for each scheduled row its line in token_ids [L, M] int32 and block_table [L, W] int32, where it
    starts, and how many tokens it computes (0: a place that is not taken). Places for tokens behind the last one get token 0
    at position 0 of line 0 and `pad_slot`. Raises ValueError for buffers that do not fit.
    """
    num_rows = columns.shape[1]
    if columns.shape[0] != 3 or out.seq_lens.shape != (num_rows,) or out.query_start.shape != (num_rows + 1,):
        raise ValueError(f"prepare_batch wants columns [3, R] for R {len(out.seq_lens)}, got {list(columns.shape)}")
    if columns.dtype != torch.int64 or not columns.is_contiguous():
        raise ValueError(f"prepare_batch wants contiguous int64 columns, got {columns.dtype}, {columns.stride()}")
    if len(out.slot_mapping) != (0 if block_table is None else len(out.input_ids)):
        raise ValueError(f"{len(out.slot_mapping)} slots for {len(out.input_ids)} tokens")
    if columns.is_cuda:
        from llmd_kernels.prepare_batch import triton

        triton.prepare_batch(out, columns, token_ids, block_table, block_size, pad_slot)
    else:
        reference.prepare_batch(out, columns, token_ids, block_table, block_size, pad_slot)


class DecodeInputs(NamedTuple):
    """Buffers for R rows that compute one token each; a captured graph reads them."""

    input_ids: torch.Tensor  # [R] int64
    slot_mapping: torch.Tensor  # [R] int64; [0] where there is no block table
    seq_lens: torch.Tensor  # [R] int32, the row's tokens once this step is computed
    num_tokens: torch.Tensor  # [R] int64, the same for samplers


def prepare_decode(
    out: DecodeInputs,
    columns: torch.Tensor,
    token_ids: torch.Tensor,
    block_table: torch.Tensor | None,
    block_size: int = 1,
) -> None:
    """Write into `out` the inputs of a step in which every row computes one token.

    columns [3, R] int64, each dense: for each row its line in token_ids [L, M] int32 and block_table [L, W] int32, the
    position of its token, and the block that comes to its table for that position; negative: the one that is there. No two
    rows have a line in common but such whose columns are equal. Raises ValueError for buffers that do not fit.
    """
    num_rows = columns.shape[1]
    if columns.shape[0] != 3 or columns.dtype != torch.int64 or columns.stride(1) != 1:
        raise ValueError(f"prepare_decode wants dense int64 columns [3, R], got {columns.dtype} {list(columns.shape)}")
    slots = 0 if block_table is None else num_rows
    if [len(column) for column in out] != [num_rows, slots, num_rows, num_rows]:
        raise ValueError(f"prepare_decode wants {num_rows} places in each column and {slots} slots")
    if columns.is_cuda:
        from llmd_kernels.prepare_batch import triton

        triton.prepare_decode(out, columns, token_ids, block_table, block_size)
    else:
        reference.prepare_decode(out, columns, token_ids, block_table, block_size)
