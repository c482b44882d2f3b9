"""y = x · Wᵀ + b over rows of W as the checkpoint has them.

The C++ kernel reads bfloat16 weights at the memory's speed for a few rows of x and works near the processor's peak for
many, so nothing is packed beforehand: a tied head shares the embedding's table, and a mapped file stays mapped. On a GPU
few rows are one pass over W as well, by the kernels here or by torch, whichever table.py has for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmd_kernels import native
from llmd_kernels.linear import cpu, reference, table
from llmd_kernels.linear.ways import max_rows
from llmd_kernels.silu_mul import gelu_mul, silu_mul

Activation = Callable[[torch.Tensor], torch.Tensor]
_KINDS: dict[Activation, int] = {silu_mul: 0, gelu_mul: 1}  # as triton.py calls them
_MULTIPLE = 16  # elements: what W's rows must be for 128 bits of them to be read at once


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] → [M, N] in `out_dtype`, by default x's."""
    if x.is_cuda and (tile := _tile(x, weight)) is not None:
        from llmd_kernels.linear import triton

        return triton.linear(x, weight, bias, out_dtype or x.dtype, tile)
    if x.shape[0] <= max_rows() and weight.dtype == x.dtype == torch.bfloat16 and native.is_available(x):
        return cpu.linear(x, weight, bias, out_dtype or x.dtype)
    return reference.linear(x, weight, bias, out_dtype or x.dtype)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """`activation` of `linear`, W being gates and then ups: act(gate) · up [M, N / 2]; in one kernel where there is one."""
    kind = _KINDS.get(activation)
    if x.is_cuda and kind is not None and (tile := _tile(x, weight)) is not None:
        from llmd_kernels.linear import triton

        return triton.linear(x, weight, bias, x.dtype, tile, kind)
    return activation(linear(x, weight, bias))


def _tile(x: torch.Tensor, weight: torch.Tensor) -> table.Tile | None:
    """How the kernels here go through W; None: torch's way."""
    if not 0 < x.shape[0] <= table.ROWS[-1] or x.dtype != weight.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    if weight.stride(1) != 1 or weight.shape[1] % _MULTIPLE or weight.stride(0) % _MULTIPLE:
        return None
    from llmd_kernels.gpu import device_name
    from llmd_kernels.linear import triton

    return None if triton.why_not(weight) else table.tile_for(device_name(x.device), x.shape[0], weight.shape[0])
