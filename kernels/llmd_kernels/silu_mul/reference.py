"""The truth, in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2·D] → silu(x[:, :D]) · x[:, D:], in float32."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def gelu_mul(x: torch.Tensor, *, tanh: bool = False) -> torch.Tensor:
    """x [T, 2·D] → gelu(x[:, :D]) · x[:, D:], in float32."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh" if tanh else "none") * up).to(x.dtype)
