"""y = x · Wᵀ + b over rows of W as the checkpoint has them.

For the few rows of a decode step the C++ kernel reads bfloat16 weights at the memory's speed, 1.3 to 1.8 times as fast as
oneDNN does from its own packed layout; so nothing is packed, and a tied head shares the embedding's table.
"""

from __future__ import annotations

import functools

import torch

from llmd_kernels import native
from llmd_kernels.linear import cpu, reference

_MAX_ROWS = 48  # beyond, oneDNN's blocking wins


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] → [M, N] in `out_dtype`, by default x's."""
    if x.shape[0] <= _max_rows() and weight.dtype == x.dtype == torch.bfloat16 and native.is_available(x):
        return cpu.linear(x, weight, bias, out_dtype or x.dtype)
    return reference.linear(x, weight, bias, out_dtype or x.dtype)


@functools.cache
def _max_rows() -> int:
    """Up to how many rows the kernel is faster than oneDNN on this CPU."""
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return 8
    return _MAX_ROWS if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 1 << 30
