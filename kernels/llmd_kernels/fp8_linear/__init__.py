"""y = x · (W · scale)ᵀ + b with W stored as 8-bit floats (e4m3fn), scaled as a whole, by output channel or by block.

Activations stay as they are, or become e4m3 first where the checkpoint's scheme says so: by one given scale, by a token's
own, or by a token's own for each block of features (DeepSeek's 1 × 128). Sums are float32, of a block at a time.
AMD's other e4m3 (fnuz) has twice the exponent's bias and no checkpoints: bytes are e4m3fn on every device.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch

from llmd_kernels import native
from llmd_kernels.fp8_linear import cpu, reference

Activations = Literal["float", "tensor", "token", "group"]


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block: tuple[int, int] | None = None,
    activations: Activations = "float",
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] → [M, N] in x's dtype.

    weight: [N, K] float8_e4m3fn. scale: one number, [N] or [N, 1], or with `block` = (rows, columns) of W the grid
    [ceil(N / rows), ceil(K / columns)]; float32 multipliers. bias: [N]. activations: "float" leaves x as it is; "tensor"
    makes it e4m3 by `x_scale`, one number; "token" and "group" by a scale a row, a row and block of columns.
    Raises ValueError for shapes, dtypes or scales that do not go together.
    """
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or weight.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"fp8_linear wants x [M, {weight.shape[1]}] and weight [N, K] float8_e4m3fn, "
            f"got {list(x.shape)} and {weight.dtype} {list(weight.shape)}"
        )
    grid, height, columns = grid_of(weight, scale, block)
    if (activations == "tensor") != (x_scale is not None):
        raise ValueError(f"fp8_linear wants x_scale with activations 'tensor' and only then, got {activations!r}")
    way = _way(x, columns)
    if activations == "float":
        return way.linear(x, None, weight, grid, height, columns, bias)
    step = columns if activations == "group" else x.shape[1]
    if in_one_go := getattr(way, "linear_of_e4m3", None):
        return in_one_go(x, step, x_scale, weight, grid, height, columns, bias)
    x, scales = reference.quantize(x, step, x_scale, grid.shape[1])
    return way.linear(x, scales, weight, grid, height, columns, bias)


def _way(x: torch.Tensor, columns: int) -> ModuleType:
    if native.is_available(x):
        return cpu
    if x.is_cuda:
        from llmd_kernels.fp8_linear import triton

        if triton.why_not(columns, x.shape[1]) is None:
            return triton
    return reference


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None) -> torch.Tensor:
    """W · scale, float32 [N, K]; scale as in `fp8_linear`."""
    return reference.dequantize(weight, *grid_of(weight, scale, block))


def quantize_weight(weight: torch.Tensor, block: tuple[int, int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] → float8_e4m3fn [N, K] and float32 scales, [N] or with `block` its grid: the largest of each becomes 448."""
    return reference.quantize_weight(weight, block or (1, weight.shape[1]))


def grid_of(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, int, int]:
    """Scales as float32 [row blocks, column blocks], rows and columns of a block. Raises ValueError for other shapes."""
    width, depth = weight.shape
    if block is None:
        block = (width if scale.numel() == 1 else 1, depth)
    shape = (-(-width // block[0]), -(-depth // block[1]))
    if scale.numel() != shape[0] * shape[1] or (scale.dim() == 2 and scale.shape != shape):
        raise ValueError(f"fp8_linear wants scale {list(shape)} for weight {list(weight.shape)}, got {list(scale.shape)}")
    return scale.reshape(shape).to(torch.float32).contiguous(), *block
