"""The truth, in torch: some rows after another, so that wide copies are not of the whole weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}  # in float32: what stays in a cache; what keeps a GPU busy
_ZERO = 8
_SHARES = (1.0, 0.86)  # of a group's largest weight that the grid reaches: the rest is cut off, the steps are finer
_SMALLEST_SCALE = 2.0**-24  # of float16


def parts(weight: Tensor) -> Iterator[slice]:
    """Rows of [N, K] to be worked on one after another; none of a weight without memory, which has nothing but a shape."""
    if weight.is_meta:
        return
    num_rows = max(1, _ELEMENTS_AT_ONCE.get(weight.device.type, 1 << 18) // weight.shape[1])
    for start in range(0, weight.shape[0], num_rows):
        yield slice(start, start + num_rows)


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] → int8 [N, K], float32 scales [N], int32 sums [N]."""
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for part in parts(weight):
        wide = weight[part].float()
        scale[part] = (wide.abs().amax(1) / 127).clamp_min_(torch.finfo(torch.float32).tiny)
        quantized[part] = (wide / scale[part].unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return quantized, scale, quantized.sum(1, dtype=torch.int32)


def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """[N, K] → uint8 codes [N, K] and float16 scales [N, ceil(K / group_size)]."""
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


def by_group(rows: Tensor, group_size: int) -> Tensor:
    """[N, K] → float32 [group_size, N · ceil(K / group_size)], a group a column, zeros behind the last one's end.

    Sums over the first dim run along the lanes of a vector unit; over a short last dim they do not.
    """
    short = -rows.shape[1] % group_size
    return torch.nn.functional.pad(rows.float(), (0, short)).view(-1, group_size).T.contiguous()


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
