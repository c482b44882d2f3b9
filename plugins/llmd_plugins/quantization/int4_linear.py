"""Round to nearest, by groups of input features, each group's scale the one that leaves the smallest squared error.

Groups are of 32: 4.5 bits a weight, and half the error of groups of 128, which save 8 % of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmd.api.v1 import Linear, ModelError, add_dense_weights
from llmd_kernels.grouped_linear import grouped_linear, pack, unpack
from llmd_plugins.quantization.grouped import PackedInGroups, by_group, keep, kept, parts
from llmd_plugins.quantization.online import Online, check_scale

GROUP_SIZES = (32, 64, 128)
_ZERO = 8
_SHARES = (1.0, 0.86)  # of a group's largest weight that the grid reaches: the rest is cut off, the steps are finer
_SMALLEST_SCALE = 2.0**-24  # of float16


class Int4(Online):
    """Quantizes every linear, and to 8 bits the table of tokens."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        options = options or {}
        group_size = options.get("group_size", 32)
        if group_size not in GROUP_SIZES:
            raise ModelError(f"quantization_options.group_size must be one of {GROUP_SIZES}, got {group_size!r}")
        super().__init__(lambda: Int4Linear(group_size), options, known=("group_size",))


class Int4Linear(PackedInGroups):
    """The dense weight as it loads, then 4-bit codes with a float16 scale for each group."""

    def __init__(self, group_size: int = 32) -> None:
        self._group_size = group_size

    def create_weights(self, layer: Linear) -> None:
        add_dense_weights(layer)

    def finish_weights(self, layer: Linear) -> None:
        codes, scale = quantize_groups(layer.weight.data, self._group_size)
        check_scale(layer, scale)
        layer.weight = None  # type: ignore[assignment]  # the original is freed before the packed one is made
        keep(layer, pack(codes, scale, bits=4, group_size=self._group_size, zero=_ZERO))

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return grouped_linear(x, kept(layer), layer.bias)

    def dense_weight(self, layer: Linear) -> Tensor:
        return unpack(kept(layer))


def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """[N, K] → uint8 codes [N, K] and float16 scales [N, ceil(K / group_size)]; weight ≈ (code - 8) · scale."""
    num_groups = -(-weight.shape[1] // group_size)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(weight.shape[0], num_groups, dtype=torch.float16, device=weight.device)
    for part in parts(weight):
        columns = by_group(weight[part], group_size)
        best = _best_scale(columns)
        scale[part] = best.view(-1, num_groups)
        rounded = _round(columns, best).add_(_ZERO).to(torch.uint8)
        codes[part] = rounded.T.reshape(len(scale[part]), -1)[:, : weight.shape[1]]
    return codes, scale


def _round(columns: Tensor, scale: Tensor) -> Tensor:
    return (columns * scale.reciprocal()).round_().clamp_(-8, 7)


def _best_scale(columns: Tensor) -> Tensor:
    """[S, G] → [G], each a float16 value: the grid's longer, negative side is where the largest weight is."""
    highest, lowest = columns.amax(0), columns.amin(0)
    largest = torch.where(highest > -lowest, highest, lowest)
    best, least = torch.full_like(largest, torch.nan), torch.full_like(largest, torch.inf)
    for share in _SHARES:
        rounded = _round(columns, _storable(largest * (share / -8)))
        fitted = (columns * rounded).sum(0) / rounded.square_().sum(0).clamp_min_(1)
        scale = _storable(fitted)
        error = _round(columns, scale).mul_(scale).sub_(columns).square_().sum(0)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _storable(scale: Tensor) -> Tensor:
    """What float16 makes of it, and never zero."""
    stored = scale.to(torch.float16).float()
    return torch.where(stored == 0, _SMALLEST_SCALE, stored)
