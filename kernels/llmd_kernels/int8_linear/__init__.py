"""y = x · Wᵀ + b with 8-bit weights, scaled by output channel, and 8-bit activations, scaled by token.

A token's scale depends on that token alone, and integers add up exactly, so a row's result is the same in every batch.
"""

from __future__ import annotations

import torch

from llmd_kernels import native
from llmd_kernels.int8_linear import cpu, reference

_ROWS_AT_ONCE = 256
_MAX_DEPTH = 1 << 16  # 255 · 127 · depth must fit 32 bits


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    row_sums: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    x_zero: int = 0,
) -> torch.Tensor:
    """[M, N] in x's dtype.

    x: [M, K]. weight: [N, K] int8. scale: [N] float32. row_sums: [N] int32, the sums of weight's rows. bias: [N] float32.
    x_scale: one float32 for all tokens instead of each one's own; x / x_scale + x_zero is rounded and cut to -128 … 127.
    """
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"int8_linear wants x [M, K] and weight [N, K], got {tuple(x.shape)}, {tuple(weight.shape)}")
    if x_scale is None and x_zero:
        raise ValueError(f"int8_linear wants x_zero only with x_scale, got {x_zero}")
    if not -128 <= x_zero <= 127:
        raise ValueError(f"int8_linear wants x_zero from -128 to 127, got {x_zero}")
    if native.is_available(x) and x.shape[1] <= _MAX_DEPTH and x.stride(1) == 1:
        return cpu.int8_linear(x, weight, scale, row_sums, bias, x_scale, x_zero)
    if x.is_cuda:
        from llmd_kernels.int8_linear import triton

        return triton.int8_linear(x, weight, scale, row_sums, bias, x_scale, x_zero)
    return reference.int8_linear(x, weight, scale, bias, x_scale, x_zero)


def quantize_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, K] → int8 [N, K], float32 scales [N] with weight ≈ int8 · scale, and the int32 sums [N] of the int8 rows."""
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    row_sums = torch.empty(weight.shape[0], dtype=torch.int32, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):  # float32 copies of a few rows, not of the whole weight
        part = slice(start, start + _ROWS_AT_ONCE)
        wide = weight[part].float()
        scale[part] = (wide.abs().amax(1) / 127).clamp_min_(torch.finfo(torch.float32).tiny)
        quantized[part] = (wide / scale[part].unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
        row_sums[part] = quantized[part].sum(1, dtype=torch.int32)
    return quantized, scale, row_sums
