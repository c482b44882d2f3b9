"""y += (x · Aᵀ) · B by row, each row with the A and B of its adapter's slot, or none: only rows that have one cost anything.

A slot holds, for each of P parts of a merged linear, up to R rows of A, and R rows of B over all outputs; how many of them
count is told by `ranks`. B carries the adapter's scaling. Sums are float32, from x to y.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from llmd_kernels import native
from llmd_kernels.lora import cpu, reference


class LoraRows(NamedTuple):
    """Which rows of x use which slot."""

    tokens: torch.Tensor  # [n] int32, rows of x that use one, slot by slot; what is behind the last slot's means nothing
    starts: torch.Tensor  # [S + 1] int32, where each slot's rows begin among `tokens`
    spans: tuple[tuple[int, int, int], ...]  # (slot, begin, end) of the slots in use, known on the host


class LoraWeights(NamedTuple):
    """The slots of one linear."""

    a: torch.Tensor  # [S, P, R, in]; of an embedding [S, 1, entries, R]
    b: torch.Tensor  # [S, R, out]
    ranks: torch.Tensor  # [S, P] int32; 0: the slot's adapter leaves this part as it is
    part_starts: tuple[int, ...]  # P + 1 places among the outputs


def rows_of_slots(slots: torch.Tensor, num_slots: int, device: torch.device) -> LoraRows:
    """Group rows by slot; slots [T] int64 on the host, negative where a row uses none."""
    ordered, order = torch.sort(slots, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_slots + 1))
    order, starts = order[starts[0] :].to(torch.int32), (starts - starts[0]).to(torch.int32)
    places = starts.tolist()
    spans = tuple((slot, begin, end) for slot, (begin, end) in enumerate(pairwise(places)) if begin < end)
    return LoraRows(order.to(device, non_blocking=True), starts.to(device, non_blocking=True), spans)


def add_lora(y: torch.Tensor, x: torch.Tensor, weights: LoraWeights, rows: LoraRows) -> torch.Tensor:
    """Add to y [T, out], in place, what the adapters make of x [T, in]; y is returned."""
    _check(y, weights)
    if x.shape != (y.shape[0], weights.a.shape[3]):
        raise ValueError(f"add_lora wants x [{y.shape[0]}, {weights.a.shape[3]}], got {list(x.shape)}")
    if _is_native(y, weights) and x.dtype == weights.a.dtype:
        return cpu.add_lora(y, x, weights, rows)
    if y.is_cuda:
        from llmd_kernels.lora import triton

        return triton.add_lora(y, x, weights, rows)
    return reference.add_lora(y, x, weights, rows)


def add_lora_of_ids(y: torch.Tensor, ids: torch.Tensor, weights: LoraWeights, rows: LoraRows) -> torch.Tensor:
    """The same for an embedding: y [T, out] of ids [T] int64, whose entries of A [S, 1, entries, R] take x · Aᵀ's place."""
    _check(y, weights)
    return reference.add_lora_of_ids(y, ids, weights, rows)


def _check(y: torch.Tensor, weights: LoraWeights) -> None:
    if y.dim() != 2 or y.shape[1] != weights.b.shape[2]:
        raise ValueError(f"add_lora wants y [T, {weights.b.shape[2]}], got {list(y.shape)}")


def _is_native(y: torch.Tensor, weights: LoraWeights) -> bool:
    return native.is_available(y) and y.stride(1) == 1 and weights.a.dtype in native.DTYPES
