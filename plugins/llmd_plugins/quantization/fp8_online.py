"""8-bit floats, made while a 16- or 32-bit checkpoint loads: int8's memory, and steps that grow with the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmd.api.v1 import Linear, add_dense_weights
from llmd_kernels.experts import Fp8Weight
from llmd_kernels.fp8_linear import Activations, dequantize, fp8_linear, quantize_weight
from llmd_kernels.quantize_weight.reference import parts
from llmd_plugins.quantization.online import Online, PackedInTensors, buffer_of, check_scale


class Fp8Online(Online):
    """Quantizes every linear, and to 8-bit integers the table of tokens."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(Fp8OnlineLinear, options or {})


class Fp8OnlineLinear(PackedInTensors):
    """weight float8_e4m3fn [out, in] with a scale for each row; a GPU's inputs become 8-bit too, by a scale a token."""

    def create_weights(self, layer: Linear) -> None:
        add_dense_weights(layer)

    def finish_weights(self, layer: Linear) -> None:
        dense = layer.weight.data
        weight = torch.empty(dense.shape, dtype=torch.float8_e4m3fn, device=dense.device)
        scale = torch.empty(dense.shape[0], dtype=torch.float32, device=dense.device)
        for part in parts(dense):
            weight[part], scale[part] = quantize_weight(dense[part])
        check_scale(layer, scale)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.register_buffer("weight_scale", scale)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        scale = buffer_of(layer, "weight_scale")
        return fp8_linear(x, layer.weight, scale, layer.bias, activations="token" if x.is_cuda else "float")

    def expert_weight(self, layer: Linear) -> Fp8Weight:
        kind: Activations = "token" if layer.weight.is_cuda else "float"
        return Fp8Weight(layer.weight, buffer_of(layer, "weight_scale"), None, kind, None)

    def dense_weight(self, layer: Linear) -> Tensor:
        return dequantize(layer.weight, buffer_of(layer, "weight_scale"))
