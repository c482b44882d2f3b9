"""The truth, in torch."""

from __future__ import annotations

import torch


def mask_logits(logits: torch.Tensor, places: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """As in the package."""
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    is_barred = (words.unsqueeze(2) >> shifts & 1).flatten(1)[:, : logits.shape[1]] == 0
    logits[places] = logits[places].masked_fill(is_barred, float("-inf"))
    return logits
