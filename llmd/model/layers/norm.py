"""RMSNorm, with the residual addition folded in."""

from __future__ import annotations

from typing import overload

import torch
from llmd_kernels.rms_norm import add_rms_norm, rms_norm

from llmd.model.layers.parameters import Layer


class RMSNorm(Layer):
    """x / rms(x) · weight over the last dim."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.device = device
        self.add_parameter("weight", (size,), dtype)

    @overload
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, *residual: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """norm(x); or, given a residual, (norm(x + residual), x + residual), where None stands for zero."""
        if not residual:
            return rms_norm(x, self.weight, self.eps)
        if residual[0] is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual[0], self.weight, self.eps)
