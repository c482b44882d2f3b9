"""act(gate) · up, the gated activations of MLPs: silu of Llama's kind, gelu of Gemma's, exact or by tanh."""

from __future__ import annotations

import torch

from llmd_kernels import native
from llmd_kernels.silu_mul import cpu, reference


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2·D], gate first, → [T, D]. Raises ValueError for other shapes."""
    _check("silu_mul", x)
    if x.is_cuda and x.is_contiguous():
        from llmd_kernels.silu_mul import triton

        return triton.activate(x, triton.SILU)
    if native.is_available(x) and x.is_contiguous():
        return cpu.activate(x, cpu.SILU)
    return reference.silu_mul(x)


def gelu_mul(x: torch.Tensor, *, tanh: bool = False) -> torch.Tensor:
    """The same with gelu; `tanh`: by its approximation."""
    _check("gelu_mul", x)
    if x.is_cuda and x.is_contiguous():
        from llmd_kernels.silu_mul import triton

        return triton.activate(x, triton.GELU_TANH if tanh else triton.GELU)
    if native.is_available(x) and x.is_contiguous():
        return cpu.activate(x, cpu.GELU_TANH if tanh else cpu.GELU)
    return reference.gelu_mul(x, tanh=tanh)


def _check(name: str, x: torch.Tensor) -> None:
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"{name} wants [T, 2*D], got {tuple(x.shape)}")
