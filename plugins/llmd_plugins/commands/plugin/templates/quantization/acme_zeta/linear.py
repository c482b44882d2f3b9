"""How a linear is kept and applied."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmd.api.v1 import Linear, ModelError, QuantMethod, add_dense_weights


class Zeta:
    """Quantizes every linear."""

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return False  # only by --quantization zeta

    def method(self, layer: Linear) -> QuantMethod | None:
        return ZetaLinear()


class ZetaLinear:
    """weight int8 [out, in], scale [out, 1]."""

    def create_weights(self, layer: Linear) -> None:
        add_dense_weights(layer)  # the checkpoint holds plain weights

    def finish_weights(self, layer: Linear) -> None:
        weight = layer.weight.data.float()
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        if not scale.isfinite().all():
            raise ModelError(f"tensor {layer.checkpoint_names[0]}.weight holds NaN or infinity")
        layer.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        layer.register_buffer("scale", scale.to(layer.dtype))

    def dense_weight(self, layer: Linear) -> Tensor:
        return layer.weight.to(layer.dtype) * layer.get_buffer("scale")

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense_weight(layer), layer.bias)
