"""Weights of 4-bit floats (e2m1), two a byte with the even input feature in the low half, and a scale for each 16 or 32.

MXFP4's scales are exponents, 2^(code - 127): OCP Microscaling Formats 1.0, §5. NVFP4's are e4m3 floats, divided (as
compressed-tensors writes it) or multiplied (as ModelOpt does) by one more for the tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmd.api.v1 import Linear, ModelError
from llmd_kernels.codebook_linear import pack
from llmd_plugins.quantization.nf4_linear import CodebookLinear
from llmd_plugins.quantization.stored import add_bias, check_scale, finish_bias, taken, taken_scale

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_HALF, *(-value for value in _HALF))
_NAN_EXPONENT = 255


class Fp4Linear(CodebookLinear):
    """packed uint8 [N, K / 2]; scales uint8 or float8_e4m3fn [N, K / group]; maybe a scale of the scales."""

    def __init__(self, packed: str, scales: str, outer: str | None, group_size: int, *, divides: bool = True) -> None:
        self._packed, self._scales, self._outer, self._group_size = packed, scales, outer, group_size
        self._divides = divides

    def create_weights(self, layer: Linear) -> None:
        rows, columns = layer.out_features, layer.in_features
        if columns % self._group_size:
            name = f"{layer.checkpoint_names[0]}.{self._packed}"
            raise ModelError(f"tensor {name}: {columns} inputs are no whole groups of {self._group_size}")
        layer.add_weight(self._packed, (rows, columns // 2), torch.uint8)
        dtype = torch.uint8 if self._outer is None else torch.float8_e4m3fn
        layer.add_weight(self._scales, (rows, columns // self._group_size), dtype)
        if self._outer is not None:
            layer.add_part_weight(self._outer, (1,), torch.float32)
        for name in ("input_global_scale", "input_scale"):
            layer.add_part_weight(name, (1,), torch.float32, default=1.0)
        add_bias(layer)

    def finish_weights(self, layer: Linear) -> None:
        for name in ("input_global_scale", "input_scale"):
            measured = layer.take(name)
            if measured is not None:
                check_scale(layer, name, measured, None)
        scale = self._exponents(layer) if self._outer is None else self._floats(layer, self._outer)
        finish_bias(layer)
        packed = taken(layer, self._packed)
        codes = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
        del packed
        self.keep(layer, pack(codes, scale, torch.tensor(E2M1, device=codes.device), group_size=self._group_size))

    def _exponents(self, layer: Linear) -> Tensor:
        codes = taken(layer, self._scales)
        scale = torch.where(codes == _NAN_EXPONENT, torch.nan, (codes.float() - 127).exp2())
        check_scale(layer, self._scales, scale)
        return scale.to(torch.bfloat16)  # a power of two is exact there

    def _floats(self, layer: Linear, outer: str) -> Tensor:
        rows = torch.tensor([part.rows.size for part in layer.parts], device=layer.device)
        whole = taken_scale(layer, outer, None)
        whole = (1 / whole if self._divides else whole).repeat_interleave(rows, 0)
        scale = taken(layer, self._scales).float()
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):  # 0 is what small groups round to, and makes them 0
            check_scale(layer, self._scales, torch.where(scale == 0, 1.0, scale))
        return (scale * whole).to(layer.dtype if layer.dtype == torch.float32 else torch.bfloat16)
