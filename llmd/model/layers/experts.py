"""A mixture of experts: many gated MLPs, of which each token uses the few that a router chose.

Every expert is made of ordinary linears, so whatever reads or quantizes linears serves experts too (Shazeer et al. 2017,
arXiv:1701.06538).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from llmd.model.layers.linear import Linear


class Expert(nn.Module):
    """down(act(gate(x)) · up(x)), its linears named as the checkpoint names them."""

    def __init__(
        self, gate_up: Linear, down: Linear, down_name: str, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        gate_up.is_routed = down.is_routed = True
        self.gate_up = gate_up
        self.add_module(down_name, down)
        self._down = down_name
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] → the same."""
        down: Linear = self._modules[self._down]  # type: ignore[assignment]
        result: torch.Tensor = down(self.activation(self.gate_up(x)))
        return result


class Experts(nn.ModuleList):
    """The experts of one layer, named by their numbers."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, hidden_size], ids [T, k] int64, weights [T, k] float32 → [T, hidden_size]: the weighted sum of k experts.

        Each token's experts are added up in float32 in the order of their numbers, whatever else is in the batch.
        """
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number, tokens, slots in _by_expert(ids):
            y = self[number](x[tokens]).float() * weights[tokens, slots].unsqueeze(1)
            total.index_add_(0, tokens, y)
        return total.to(x.dtype)


def _by_expert(ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each expert in use: its number, its tokens, and at which of their k places it stands."""
    order = ids.flatten().argsort(stable=True)
    numbers, counts = ids.flatten().unique(return_counts=True)
    for number, places in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
        yield number, places // ids.shape[1], places % ids.shape[1]


def route(logits: torch.Tensor, num_chosen: int, *, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] → ids [T, k] int64 and weights [T, k] float32: the likeliest experts and their probabilities.

    With `normalized` those add up to 1.
    """
    weights, ids = logits.float().softmax(1).topk(num_chosen, dim=1)
    return ids, weights / weights.sum(1, keepdim=True) if normalized else weights
