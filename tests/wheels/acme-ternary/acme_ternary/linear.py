"""The packing: byte j of a row holds columns 4j … 4j+3, two bits each from the lowest, as weight + 1."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmd.api.v1 import Linear, ModelError, QuantMethod, add_dense_weights

_SHIFTS = (0, 2, 4, 6)


def pack(ternary: Tensor) -> Tensor:
    """[out, in] of -1, 0, 1 → uint8 [out, ceil(in / 4)]."""
    padded = nn.functional.pad(ternary + 1, (0, -ternary.shape[1] % 4)).to(torch.uint8)
    quads = padded.view(ternary.shape[0], -1, 4)
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The other way round: int8 [out, columns]."""
    quads = torch.stack([(packed >> shift) & 3 for shift in _SHIFTS], dim=2)
    return quads.flatten(1)[:, :columns].to(torch.int8) - 1


class Ternary:
    """Every linear."""

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return False

    def method(self, layer: Linear) -> QuantMethod | None:
        return TernaryLinear()


class TernaryLinear:
    """packed uint8 [out, ceil(in / 4)], scale [out, 1]."""

    def create_weights(self, layer: Linear) -> None:
        add_dense_weights(layer)

    def finish_weights(self, layer: Linear) -> None:
        weight = layer.weight.data.float()
        scale = weight.abs().mean(1, keepdim=True).clamp_min(1e-12)
        if not scale.isfinite().all():
            raise ModelError(f"tensor {layer.checkpoint_names[0]}.weight holds NaN or infinity")
        layer.weight = nn.Parameter(pack((weight / scale).round().clamp(-1, 1)), requires_grad=False)
        layer.register_buffer("scale", scale.to(layer.dtype))

    def dense_weight(self, layer: Linear) -> Tensor:
        return unpack(layer.weight, layer.in_features).to(layer.dtype) * layer.get_buffer("scale")

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense_weight(layer), layer.bias)
