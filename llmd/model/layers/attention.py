"""The attention of one layer over its part of the KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llmd.model.attention import AttentionBackend, AttentionExtras, EncoderAttentionBackend
    from llmd.model.batch import Batch


class Attention:
    """Stores a step's keys and values and attends; what differs between layers of one backend is held here."""

    def __init__(
        self, backend: AttentionBackend, index: int, scale: float, window: int | None, extras: AttentionExtras | None = None
    ) -> None:
        self.backend = backend
        self.index = index  # of the layer within the KV pool
        self.scale = scale
        self.window = window
        self.extras = extras  # may be set once weights are there, which sinks are

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """q [T, H, D], k and v [T, K, D] → [T, H·D]."""
        extras = {} if self.extras is None else {"extras": self.extras}
        mixed = self.backend.forward(
            q, k, v, batch.kv[self.index], batch.attention, scale=self.scale, window=self.window, **extras
        )
        return mixed.view(q.shape[0], -1)


class EncoderAttention:
    """Attends among the tokens of each sequence; `window`: how far a token sees to either side."""

    def __init__(self, backend: EncoderAttentionBackend, scale: float, window: int | None) -> None:
        self.backend = backend
        self.scale = scale
        self.window = window

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """q [T, H, D], k and v [T, K, D] → [T, H·D]."""
        mixed = self.backend.forward(q, k, v, batch.attention, scale=self.scale, window=self.window)
        return mixed.view(q.shape[0], -1)
