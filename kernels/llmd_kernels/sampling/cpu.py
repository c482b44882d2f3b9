"""Launches llmd_sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmd_kernels.native import DTYPES, library

if TYPE_CHECKING:
    from llmd_kernels.sampling import Knobs


def sample(
    logits: torch.Tensor, rows: torch.Tensor, num_tokens: torch.Tensor, knobs: Knobs
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in the package; logits float32 or bfloat16 with dense rows, rows and num_tokens contiguous."""
    count, width = logits.shape
    tokens = torch.empty(count, dtype=torch.int64)
    best = torch.empty(count, dtype=torch.float32)
    lib = library()
    assert lib is not None
    lib.llmd_sample(
        tokens.data_ptr(), best.data_ptr(), logits.data_ptr(), rows.data_ptr(), num_tokens.data_ptr(),
        knobs.seeds.data_ptr(), knobs.values.data_ptr(), count, width, logits.stride(0), DTYPES[logits.dtype],
    )  # fmt: skip
    return tokens, best
