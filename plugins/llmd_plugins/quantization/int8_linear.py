"""y = (x_q · W_q) · s_x · s_w: weights scaled by output channel when loaded, activations by token when used.

A token's scale depends on that token alone, and integers add up exactly, so a row's result is the same in every batch.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmd.api.v1 import Linear, QuantMethod, add_dense_weights

log = logging.getLogger("llmd.quantization")

_ZERO = 128  # activations are unsigned: oneDNN has no fast kernel for signed ones


class Int8:
    """Quantizes every linear of the decoder; the embedding and the head are no linears and stay as they are."""

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return False  # it is never how a checkpoint is stored

    def method(self, layer: Linear) -> QuantMethod | None:
        return OneDnnInt8() if layer.device.type == "cpu" and _onednn_is_fast() else PlainInt8()


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] → int8 [N, K] and float32 scales [N]: weight ≈ int8 · scale."""
    wide = weight.float()
    scale = (wide.abs().amax(1) / 127).clamp_min_(torch.finfo(torch.float32).tiny)
    return (wide / scale.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8), scale


class PlainInt8:
    """For devices without a faster kernel: weights are stored in 8 bits and widened for each product."""

    def create_weights(self, layer: Linear) -> None:
        add_dense_weights(layer)

    def finish_weights(self, layer: Linear) -> None:
        quantized, scale = quantize_channels(layer.weight.data)
        layer.weight = nn.Parameter(quantized, requires_grad=False)
        layer.register_buffer("weight_scale", scale)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        y = F.linear(x, layer.weight.to(x.dtype)) * layer.weight_scale.to(x.dtype)
        return y if layer.bias is None else y + layer.bias


class OneDnnInt8:
    """CPU: 8-bit products by oneDNN, two to three times the speed of bfloat16."""

    def create_weights(self, layer: Linear) -> None:
        add_dense_weights(layer)

    def finish_weights(self, layer: Linear) -> None:
        quantized, scale = quantize_channels(layer.weight.data)
        layer.weight = nn.Parameter(torch.empty(0, dtype=layer.dtype), requires_grad=False)
        layer.packed = torch.ops.onednn.qlinear_prepack(quantized, None)
        layer.weight_scale = scale
        layer.weight_zero = torch.zeros(layer.out_features, dtype=torch.int32)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        quantized, scale = quantize_tokens(x)
        y = torch.ops.onednn.qlinear_pointwise(
            quantized, 1.0, _ZERO, layer.packed, layer.weight_scale, layer.weight_zero, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        y *= scale
        return (y if layer.bias is None else y.add_(layer.bias)).to(x.dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] → uint8 [T, K] around 128 and float32 scales [T, 1]."""
    wide = x.float()
    scale = (wide.abs().amax(1, keepdim=True) / 127).clamp_min_(torch.finfo(torch.float32).tiny)
    return (wide / scale).round_().add_(_ZERO).to(torch.uint8), scale


@functools.cache
def _onednn_is_fast() -> bool:
    """Whether oneDNN's 8-bit product is there and no reference kernel, which would be a hundred times slower."""
    x = torch.full((16, 512), _ZERO, dtype=torch.uint8)
    weight = torch.ones(512, 512, dtype=torch.int8)
    scale, zero = torch.ones(512), torch.zeros(512, dtype=torch.int32)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        elapsed = []
        for _ in range(3):
            start = time.perf_counter()
            torch.ops.onednn.qlinear_pointwise(
                x, 1.0, _ZERO, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
            )
            elapsed.append(time.perf_counter() - start)
    except (RuntimeError, AttributeError) as error:
        log.info("int8 without oneDNN: %s", error)
        return False
    if min(elapsed) > 0.005:  # 4 M products take well under a millisecond
        log.info("int8 without oneDNN: its kernel takes %.1f ms here", 1e3 * min(elapsed))
        return False
    return True
