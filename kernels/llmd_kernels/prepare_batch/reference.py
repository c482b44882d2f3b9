"""The truth, in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llmd_kernels.prepare_batch import DecodeInputs, StepInputs


def prepare_batch(
    out: StepInputs,
    columns: torch.Tensor,
    token_ids: torch.Tensor,
    block_table: torch.Tensor | None,
    block_size: int,
    pad_slot: int,
) -> None:
    """As in the package."""
    rows, starts, counts = columns
    out.query_start[0] = 0
    out.query_start[1:] = counts.cumsum(0)
    out.seq_lens.copy_(starts + counts)
    ends, token = out.query_start[1:], torch.arange(len(out.input_ids), device=columns.device, dtype=torch.int32)
    is_token = token < ends[-1]
    at = torch.searchsorted(ends, token, right=True).clamp_max_(len(rows) - 1)
    out.positions.copy_(torch.where(is_token, starts[at] + token - out.query_start[at], 0))
    out.token_rows.copy_(torch.where(is_token, rows[at], 0))
    out.input_ids.copy_(torch.where(is_token, token_ids[out.token_rows, out.positions], 0))
    if block_table is not None:
        slots = block_table[out.token_rows, out.positions // block_size].long() * block_size + out.positions % block_size
        out.slot_mapping.copy_(torch.where(is_token, slots, pad_slot))


def prepare_decode(
    out: DecodeInputs, columns: torch.Tensor, token_ids: torch.Tensor, block_table: torch.Tensor | None, block_size: int
) -> None:
    """As in the package."""
    lines, positions, new_blocks = columns
    out.input_ids.copy_(token_ids[lines, positions])
    out.num_tokens.copy_(positions + 1)
    out.seq_lens.copy_(positions + 1)
    if block_table is not None:
        places = positions // block_size
        blocks = torch.where(new_blocks >= 0, new_blocks, block_table[lines, places].long())
        block_table[lines, places] = blocks.to(torch.int32)
        out.slot_mapping.copy_(blocks * block_size + positions % block_size)
