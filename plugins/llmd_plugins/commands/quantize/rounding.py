"""Codes, scales and zero points of a weight's groups, rounded to nearest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """W ≈ (code - zero) · scale, 0 ≤ code < 2^bits; scale and zero [N, G], scale as float16 keeps it."""

    scale: Tensor
    zero: Tensor
    bits: int

    def codes(self, weight: Tensor, group: Tensor | int) -> Tensor:
        """Of columns [N, C] that are in these groups, or all in one."""
        scale, zero = self._of(group)
        return ((weight / scale).round() + zero).clamp(0, (1 << self.bits) - 1)

    def values(self, codes: Tensor, group: Tensor | int) -> Tensor:
        """What codes [N, C] stand for."""
        scale, zero = self._of(group)
        return (codes - zero) * scale

    def _of(self, group: Tensor | int) -> tuple[Tensor, Tensor]:
        part = slice(group, group + 1) if isinstance(group, int) else group
        return self.scale[:, part], self.zero[:, part]


def fit(groups: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """The grid that spans each group, [N, G, S]: from its least to its largest, or as far to both sides."""
    high, low = groups.amax(2).clamp_min(0), groups.amin(2).clamp_max(0)
    top = (1 << bits) - 1
    if symmetric:
        reach = torch.maximum(high, -low)
        scale = _storable(2 * reach / top)
        return Grid(scale, torch.full_like(scale, 1 << (bits - 1)), bits)
    scale = _storable((high - low) / top)
    return Grid(scale, (-low / scale).round().clamp(0, top), bits)


def round_to_nearest(weight: Tensor, group_size: int, bits: int, *, symmetric: bool) -> tuple[Tensor, Grid]:
    """[N, K] → codes [N, K], grid; K is a multiple of group_size."""
    grid = fit(weight.unflatten(1, (-1, group_size)), bits, symmetric=symmetric)
    return grid.codes(weight, torch.arange(weight.shape[1], device=weight.device) // group_size), grid


def _storable(scale: Tensor) -> Tensor:
    return scale.clamp_min(2.0**-24).to(torch.float16).float()
