"""The same in plain torch: one score matrix over the whole batch, of which each sequence has its block."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def encoder_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], scale: float, window: int | None
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v in float32 over the tokens of one's own sequence at most `window` away."""
    index = torch.arange(len(lengths), device=q.device).repeat_interleave(torch.tensor(lengths, device=q.device))
    position = torch.arange(len(index), device=q.device)
    seen = index[:, None] == index[None]
    if window is not None:
        seen &= (position[:, None] - position[None]).abs() <= window
    group = q.shape[1] // k.shape[1]
    keys, values = (part.float().repeat_interleave(group, dim=1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
