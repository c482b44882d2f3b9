"""The quantization that needs no prepared checkpoint: weights become 8-bit as each linear's last part arrives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmd.api.v1 import Linear, add_dense_weights
from llmd_kernels.int8_linear import Int8Weight, dequantize, int8_linear, quantize
from llmd_plugins.quantization.online import Online, PackedInTensors, check_scale, keep_int8, kept_int8


class Int8(Online):
    """Quantizes every linear, and the table of tokens."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(Int8Linear, options or {})


class Int8Linear(PackedInTensors):
    """8-bit weights with a scale for each output; activations are quantized by token when used."""

    def create_weights(self, layer: Linear) -> None:
        add_dense_weights(layer)

    def finish_weights(self, layer: Linear) -> None:
        weight = quantize(layer.weight.data)
        check_scale(layer, weight.scale)
        keep_int8(layer, weight)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return int8_linear(x, kept_int8(layer), layer.bias)

    def dense_weight(self, layer: Linear) -> Tensor:
        return dequantize(kept_int8(layer))

    def expert_weight(self, layer: Linear) -> Int8Weight:
        return kept_int8(layer)
