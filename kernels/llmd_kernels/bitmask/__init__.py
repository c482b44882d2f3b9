"""Which tokens a grammar allows, as bits, put upon logits."""

from __future__ import annotations

import torch

from llmd_kernels.bitmask import reference


def mask_logits(logits: torch.Tensor, places: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Bar every token whose bit is not set, in place; returns logits.

    logits [R, V] float32 or 16 bits with dense rows; places [P] int64, rows of logits, each at most once; words [P, W] int32
    with 32 · W >= V, bit i % 32 of word i // 32 for token i. Raises ValueError for shapes that do not fit.
    """
    if logits.dim() != 2 or words.dim() != 2 or places.shape != words.shape[:1] or 32 * words.shape[1] < logits.shape[1]:
        raise ValueError(
            f"mask_logits wants logits [R, V], places [P] and words [P, V / 32], got {list(logits.shape)}, "
            f"{list(places.shape)}, {list(words.shape)}"
        )
    if words.dtype != torch.int32 or places.dtype != torch.int64 or not words.is_contiguous():
        raise ValueError(f"mask_logits wants int64 places and contiguous int32 words, got {places.dtype}, {words.dtype}")
    if logits.is_cuda and logits.stride(1) == 1:
        from llmd_kernels.bitmask import triton

        return triton.mask_logits(logits, places, words)
    return reference.mask_logits(logits, places, words)
