"""GPTQ (Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers): columns are
rounded one after another, and what rounding changed in the output is made up for by the columns still to come."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmd_plugins.commands.quantize.rounding import Grid, fit

_BLOCK = 128  # columns whose changes reach the rest together


class Rounded(NamedTuple):
    """Codes [N, K] in the order of the input features, each feature's group [K], and the groups' grid."""

    codes: Tensor
    groups: Tensor
    grid: Grid

    def values(self) -> Tensor:
        """[N, K] float32."""
        return self.grid.values(self.codes, self.groups)


def gptq(weight: Tensor, hessian: Tensor, *, bits: int, group_size: int, damp: float, desc_act: bool) -> Rounded:
    """Round weight [N, K] for inputs whose products add up to `hessian` [K, K], symmetric groups of `group_size` columns."""
    weight, hessian = weight.float().clone(), hessian.double().clone()
    diagonal = hessian.diagonal()
    is_dead = diagonal == 0
    diagonal[is_dead] = 1
    weight[:, is_dead] = 0  # no input reaches them
    order = diagonal.argsort(descending=True) if desc_act else torch.arange(len(diagonal), device=weight.device)
    weight, hessian = weight[:, order], hessian[order][:, order]
    factor = _inverse_factor(hessian, damp).float()
    codes, scales = torch.empty_like(weight), []
    for start in range(0, weight.shape[1], _BLOCK):
        end = min(start + _BLOCK, weight.shape[1])
        errors = torch.empty_like(weight[:, start:end])
        for column in range(start, end):
            if column % group_size == 0:
                grid = fit(weight[:, None, column : column + group_size], bits, symmetric=True)
                scales.append(grid.scale)
            value = weight[:, column : column + 1]
            codes[:, column : column + 1] = grid.codes(value, 0)
            error = (value - grid.values(codes[:, column : column + 1], 0)) / factor[column, column]
            weight[:, column:end] -= error * factor[column, column:end]
            errors[:, column - start] = error.squeeze(1)
        weight[:, end:] -= errors @ factor[start:end, end:]
    scale = torch.cat(scales, dim=1)
    back = order.argsort()
    groups = torch.arange(weight.shape[1], device=weight.device) // group_size
    return Rounded(codes[:, back], groups[back], Grid(scale, torch.full_like(scale, 1 << (bits - 1)), bits))


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse, damped until there is one."""
    mean = hessian.diagonal().mean()
    for power in range(8):
        damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (mean * damp * 2**power)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    raise ValueError("the Hessian has no inverse: are there NaN among the inputs?")
