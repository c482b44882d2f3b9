"""RMSNorm, with the residual addition folded in, and LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmd.model.layers.parameters import Layer
from llmd_kernels.rms_norm import add_rms_norm, rms_norm


class RMSNorm(Layer):
    """x / rms(x) · weight over the last dim."""

    weight: torch.Tensor

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.device = device
        self.add_parameter("weight", (size,), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [..., size]."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual); None stands for zero. `residual` may be overwritten."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(Layer):
    """(x - mean) / std · weight + bias over the last dim."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, size: int, eps: float, *, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.device = device
        self.add_parameter("weight", (size,), dtype)
        self.register_parameter("bias", None)
        if bias:
            self.add_parameter("bias", (size,), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [..., size]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
