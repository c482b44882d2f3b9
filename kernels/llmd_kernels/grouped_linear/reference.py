"""The truth, in torch."""

from __future__ import annotations

import torch


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, K] → uint8 [N, K] or, with 4 bits, [N, ceil(K / 2)]: an even column in the low half of a byte."""
    if bits == 8:
        return q.contiguous()
    if q.shape[1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    return q[:, 0::2] | (q[:, 1::2] << 4)


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    columns: torch.Tensor | None,
    bits: int,
    group_size: int,
    zero: int,
    in_features: int,
) -> torch.Tensor:
    """float32 [N, in_features], columns in the order of the input features."""
    q = packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
    group = torch.arange(in_features, device=packed.device) // group_size
    wide = q[:, :in_features].float()
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
