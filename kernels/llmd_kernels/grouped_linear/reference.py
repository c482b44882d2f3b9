"""The truth, in torch."""

from __future__ import annotations

import torch


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    columns: torch.Tensor | None,
    group_size: int,
    zero: int,
) -> torch.Tensor:
    """q uint8 [N, K], scale and offset [N, groups] → float32 [N, K], columns in the order of the input features."""
    group = torch.arange(q.shape[1], device=q.device) // group_size
    wide = q.float()
    weight = (
        (wide - zero) * scale.float()[:, group]
        if offset is None
        else wide * scale.float()[:, group] + offset.float()[:, group]
    )
    if columns is None:
        return weight
    return torch.empty_like(weight).index_copy_(1, columns.long(), weight)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], weight [N, K] float32, bias [N] → [M, N] in x's dtype; sums in float32."""
    y = x.float() @ weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)
