"""Activations of MLPs, gated and plain."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from llmd.errors import ModelError
from llmd_kernels.silu_mul import gelu_mul, silu_mul


def _gelu_tanh_mul(x: torch.Tensor) -> torch.Tensor:
    return gelu_mul(x, tanh=True)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
_GATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu_mul,
    "swish": silu_mul,
    "gelu": gelu_mul,
    "gelu_pytorch_tanh": _gelu_tanh_mul,
}


def gated_activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """act(gate) · up over [T, 2·D] → [T, D]."""
    if name not in _GATED:
        raise ModelError(f"config.json: hidden_act must be one of {', '.join(_GATED)}, got {name!r}")
    return _GATED[name]


def plain_activation(name: str, key: str = "hidden_act") -> Callable[[torch.Tensor], torch.Tensor]:
    """act over [T, D]; `key` is where config.json names it."""
    if name not in _PLAIN:
        raise ModelError(f"config.json: {key} must be one of {', '.join(_PLAIN)}, got {name!r}")
    return _PLAIN[name]
