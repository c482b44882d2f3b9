"""y = x · Wᵀ + b over rows of W as the checkpoint has them.

The C++ kernel reads bfloat16 weights at the memory's speed for a few rows of x and works near the processor's peak for
many, so nothing is packed beforehand: a tied head shares the embedding's table, and a mapped file stays mapped.
"""

from __future__ import annotations

import torch

from llmd_kernels import native
from llmd_kernels.linear import cpu, reference
from llmd_kernels.linear.ways import max_rows


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] → [M, N] in `out_dtype`, by default x's."""
    if x.shape[0] <= max_rows() and weight.dtype == x.dtype == torch.bfloat16 and native.is_available(x):
        return cpu.linear(x, weight, bias, out_dtype or x.dtype)
    return reference.linear(x, weight, bias, out_dtype or x.dtype)
