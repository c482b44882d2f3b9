"""The truth, in torch."""

from __future__ import annotations

import torch


def quantize_tokens(
    x: torch.Tensor, x_scale: torch.Tensor | None = None, x_zero: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] → whole numbers that 8 bits hold, less x_zero, as float32 [M, K], and float32 scales [M, 1]."""
    wide = x.float()
    if x_scale is None:
        scale = (wide.abs().amax(1, keepdim=True) / 127).clamp_min_(torch.finfo(torch.float32).tiny)
    else:
        scale = x_scale.reshape(1, 1).expand(x.shape[0], 1)
    return (wide * (1 / scale)).round_().clamp_(-128 - x_zero, 127 - x_zero), scale


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor | None = None,
    x_zero: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [M, K], weight [N, K] int8, scale [N], bias [N] → [M, N] in `out_dtype`, by default x's; sums in float32."""
    tokens, token_scale = quantize_tokens(x, x_scale, x_zero)
    y = (tokens @ weight.float().T) * (token_scale * scale)
    return (y if bias is None else y + bias.float()).to(out_dtype or x.dtype)
