"""The truth, in torch."""

from __future__ import annotations

import torch


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, at: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As in the package."""
    x = logits.float() if at is None else logits[at].float()
    token = x.gather(1, token_ids.unsqueeze(1))
    norm = torch.logsumexp(x, 1, keepdim=True)
    values, ids = x.sort(dim=1, descending=True, stable=True)
    num_top = min(num_top, x.shape[1])
    ranks = (x > token).sum(1) + 1
    return (token - norm).squeeze(1), ranks, ids[:, :num_top].contiguous(), values[:, :num_top] - norm
