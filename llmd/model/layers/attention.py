"""The attention of one layer over its part of the KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmd.model.attention import HeadTurn

if TYPE_CHECKING:
    from llmd.model.attention import AttentionBackend, AttentionExtras, EncoderAttentionBackend
    from llmd.model.batch import Batch
    from llmd.model.layers.norm import RMSNorm
    from llmd.model.layers.rotary import Rotary


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

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: Batch,
        *,
        rotary: Rotary | None = None,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
    ) -> torch.Tensor:
        """q [T, H, D], k and v [T, K, D] → [T, H·D].

        With `norms` the heads of q and k are normalised first, with `rotary` turned: in one launch where the backend can.
        """
        given: dict[str, Any] = {} if self.extras is None else {"extras": self.extras}
        if rotary is not None and getattr(self.backend, "turns_heads", False):
            weights = None if norms is None else (norms[0].weight, norms[1].weight, norms[0].eps)
            given["turn"] = HeadTurn(batch.positions, rotary.cos_sin, weights)
        else:
            if norms is not None:
                q, k = norms[0](q), norms[1](k)
            if rotary is not None:
                rotary(batch.positions, q, k)
        mixed = self.backend.forward(
            q, k, v, batch.kv[self.index], batch.attention, scale=self.scale, window=self.window, **given
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
