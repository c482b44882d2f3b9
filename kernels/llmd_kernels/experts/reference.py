"""The truth, in torch; it waits for the device, for which experts are wanted is a matter of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from llmd_kernels.experts.weights import ExpertWeights, apply


def route(logits: torch.Tensor, num_chosen: int, *, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] → ids [T, k] int64 and weights [T, k] float32; of equal ones the lowest number comes first."""
    p = logits.float().softmax(1)
    ids = p.sort(dim=1, descending=True, stable=True).indices[:, :num_chosen]
    weights = p.gather(1, ids)
    return ids, weights / weights.sum(1, keepdim=True) if normalized else weights


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """As in the package; `activation` [M, 2·I] → [M, I]."""
    parts = torch.empty(*ids.shape, down.out_features, dtype=x.dtype, device=x.device)
    for number, tokens, slots in by_expert(ids):
        hidden = activation(apply(x[tokens], gate_up.each[number]))
        parts[tokens, slots] = apply(hidden, down.each[number])
    return add_up(parts, weights)


def add_gated(y: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """y and x [T, H], gate [T, 1] → y + sigmoid(gate) · x."""
    return y + torch.sigmoid(gate) * x


def add_up(parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """parts [T, k, H] by weights [T, k] → [T, H] in the parts' dtype, added up in float32 one slot after another."""
    total = torch.zeros(parts.shape[0], parts.shape[2], dtype=torch.float32, device=parts.device)
    for slot in range(parts.shape[1]):
        total += parts[:, slot].float() * weights[:, slot, None]
    return total.to(parts.dtype)


def by_expert(ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each expert in use: its number, its tokens, and at which of their k places it stands."""
    order = ids.flatten().argsort(stable=True)
    numbers, counts = ids.flatten().unique(return_counts=True)
    for number, places in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
        yield number, places // ids.shape[1], places % ids.shape[1]
