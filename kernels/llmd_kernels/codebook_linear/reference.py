"""In torch: a panel of rows becomes dense, is multiplied and forgotten, so that no dense copy of the weight ever stands."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_PANEL_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # what stays in a cache; what keeps a GPU busy


def pack(q: torch.Tensor) -> torch.Tensor:
    """[N, K] → uint8 [N, ceil(K / 2)]."""
    if q.shape[1] % 2:
        q = F.pad(q, (0, 1))
    return q[:, 0::2] | (q[:, 1::2] << 4)


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    codebook: torch.Tensor,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[N, in_features] in `dtype`."""
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack((codebook[byte & 15], codebook[byte >> 4]), dim=1)  # [256, 2]: both values of a byte in one look-up
    values = F.embedding(packed.int(), pairs).flatten(1)
    num_groups = scale.shape[1]
    if num_groups * group_size != values.shape[1]:
        group = torch.arange(in_features, device=packed.device) // group_size
        return (values[:, :in_features] * scale.float()[:, group]).to(dtype)
    return (values.view(-1, num_groups, group_size) * scale.float().unsqueeze(2)).flatten(1).to(dtype)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    codebook: torch.Tensor,
    group_size: int,
    in_features: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [M, K] → [M, N] in x's dtype."""
    num_rows = max(1, _PANEL_ELEMENTS.get(x.device.type, 1 << 20) // in_features)
    y = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype, device=x.device)
    for start in range(0, packed.shape[0], num_rows):
        part = slice(start, start + num_rows)
        panel = dequantize(packed[part], scale[part], codebook, group_size, in_features, x.dtype)
        y[:, part] = F.linear(x, panel)
    return y if bias is None else y.add_(bias)
