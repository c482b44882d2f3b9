"""Launches llmd_embedding."""

from __future__ import annotations

import torch

from llmd_kernels.native import DTYPES, library


def embedding(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ids [...] int64, contiguous; table [N, D] with dense rows."""
    num_ids, dim = table.shape
    out = torch.empty(*ids.shape, dim, dtype=table.dtype)
    lib = library()
    assert lib is not None
    lib.llmd_embedding(
        out.data_ptr(), ids.data_ptr(), table.data_ptr(), ids.numel(), num_ids, dim, table.stride(0), DTYPES[table.dtype]
    )
    return out
