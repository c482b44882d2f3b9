"""The truth, in torch."""

from __future__ import annotations

import torch


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Turn q [T, H, D] and k [T, K, D] in place, in float32."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, R/2]
    for heads in (q, k):
        turned = heads[..., : cos_sin.shape[1]]
        first, second = turned.float().chunk(2, dim=-1)
        turned.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
