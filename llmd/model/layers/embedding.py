"""Token ids to vectors, and vectors to logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from llmd.model.layers.parameters import Layer, WeightSlot
from llmd_kernels.linear import linear


class Embedding(Layer):
    """The table [vocab_size, hidden_size]."""

    weight: torch.Tensor

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.add_parameter("weight", (vocab_size, hidden_size), dtype)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 → [T, hidden_size]."""
        return F.embedding(input_ids, self.weight)


class LMHead(Layer):
    """Hidden states to float32 logits; `tied` is the embedding whose table it shares."""

    weight: torch.Tensor

    def __init__(
        self, vocab_size: int, hidden_size: int, tied: Embedding | None, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.device = device
        self._tied = [] if tied is None else [tied]  # in a list: not a submodule, its weight is loaded once
        if tied is None:
            self.add_parameter("weight", (vocab_size, hidden_size), dtype)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Its own table, or nothing."""
        return iter(()) if self._tied else super().weight_slots()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size] → [N, vocab_size] float32."""
        return linear(hidden, self._tied[0].weight if self._tied else self.weight, out_dtype=torch.float32)
