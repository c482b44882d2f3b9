"""The truth, in torch: counts over the whole vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llmd_kernels.penalties import Bias


def penalise(
    logits: torch.Tensor,
    rows: torch.Tensor,
    num_tokens: torch.Tensor,
    token_ids: torch.Tensor,
    facts: torch.Tensor | None,
    bias: Bias | None = None,
) -> torch.Tensor:
    """As in the package."""
    if bias is not None:
        owner = torch.repeat_interleave(bias.starts.diff().long(), output_size=len(bias.ids))
        logits.index_put_((owner, bias.ids), bias.values, accumulate=True)
    if facts is None:
        return logits
    num_prompt, repetition, frequency, presence = facts[rows].unsqueeze(2).unbind(1)
    position = torch.arange(token_ids.shape[1], device=logits.device)
    tokens, is_output = token_ids[rows].long(), position >= num_prompt
    counts = (position < num_tokens.unsqueeze(1)) & (tokens >= 0) & (tokens < logits.shape[1])
    tokens = torch.where(counts, tokens, 0)
    seen = torch.zeros(logits.shape, dtype=torch.int64, device=logits.device).scatter_add_(1, tokens, counts.long())
    count = torch.zeros_like(logits).scatter_add_(1, tokens, (counts & is_output).float())
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    changed = torch.where(seen > 0, repeated, logits) - frequency * count - presence * (count > 0)
    return logits.copy_(changed)
