"""The quantization that needs no prepared checkpoint: weights become 8-bit as each linear's last part arrives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmd.api.v1 import Linear, add_dense_weights
from llmd_kernels.int8_linear import int8_linear, quantize_channels
from llmd_plugins.quantization.online import Online, check_scale


class Int8(Online):
    """Quantizes every linear, and the table of tokens."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(Int8Linear, options or {})


class Int8Linear:
    """weight int8 [out, in] with a scale and the sum of each row; activations are quantized by token when used."""

    def create_weights(self, layer: Linear) -> None:
        add_dense_weights(layer)

    def finish_weights(self, layer: Linear) -> None:
        weight, scale, row_sums = quantize_channels(layer.weight.data)
        check_scale(layer, scale)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.register_buffer("weight_scale", scale)
        layer.register_buffer("weight_sums", row_sums)
        layer.register_buffer("wide_bias", None if layer.bias is None else layer.bias.to(torch.float32))

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        buffers = layer._buffers
        scale, row_sums = buffers["weight_scale"], buffers["weight_sums"]
        assert scale is not None
        assert row_sums is not None
        return int8_linear(x, layer.weight, scale, row_sums, buffers["wide_bias"])

    def dense_weight(self, layer: Linear) -> Tensor:
        scale = layer._buffers["weight_scale"]
        assert scale is not None
        return layer.weight.float() * scale.unsqueeze(1)
