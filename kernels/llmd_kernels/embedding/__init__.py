"""Rows of a table by ids: what turns token ids into the first hidden states."""

from __future__ import annotations

import torch

from llmd_kernels import native
from llmd_kernels.embedding import cpu, reference


def embedding(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """table [N, D] at ids [...] → [..., D]; an id outside the table reads the nearest row, never memory that is not its own.

    Raises ValueError for a table that is no matrix or has no rows, and for ids that are not whole numbers.
    """
    if table.dim() != 2 or not table.shape[0]:
        raise ValueError(f"embedding wants a table [N, D], got {tuple(table.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"embedding wants int32 or int64 ids, got {ids.dtype}")
    if table.stride(1) == 1 and ids.is_contiguous() and ids.device == table.device:
        if table.is_cuda:
            from llmd_kernels.embedding import triton

            return triton.embedding(ids, table)
        if ids.dtype == torch.int64 and native.is_available(table):
            return cpu.embedding(ids, table)
    return reference.embedding(ids, table)
