"""The truth, in torch, slot by slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llmd_kernels.lora import LoraRows, LoraWeights


def add_lora(y: torch.Tensor, x: torch.Tensor, weights: LoraWeights, rows: LoraRows) -> torch.Tensor:
    """y [T, out] += (x [T, in] · A [in, rank]) · B [rank, out], part by part."""
    for slot, begin, end in rows.spans:
        tokens = rows.tokens[begin:end].long()
        chosen = x[tokens].float()
        for part, rank in enumerate(weights.ranks[slot].tolist()):
            low, high = weights.part_starts[part : part + 2]
            hidden = chosen @ weights.a[slot, part, :rank].float().T
            delta = hidden @ weights.b[slot, :rank, low:high].float()
            y[tokens, low:high] = (y[tokens, low:high].float() + delta).to(y.dtype)
    return y


def add_lora_of_ids(y: torch.Tensor, ids: torch.Tensor, weights: LoraWeights, rows: LoraRows) -> torch.Tensor:
    """y [T, out] += A[ids] [T, rank] · B [rank, out]."""
    for slot, begin, end in rows.spans:
        tokens = rows.tokens[begin:end].long()
        rank = int(weights.ranks[slot, 0])
        hidden = weights.a[slot, 0, ids[tokens], :rank].float()
        y[tokens] = (y[tokens].float() + hidden @ weights.b[slot, :rank].float()).to(y.dtype)
    return y
