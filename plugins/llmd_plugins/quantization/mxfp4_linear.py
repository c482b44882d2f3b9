"""MXFP4's tensors of a linear: weight_blocks uint8 [N, K / 32, 16], two codes a byte; weight_scales uint8 [N, K / 32]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from llmd.api.v1 import Linear, ModelError, QuantMethod
from llmd_plugins.quantization.fp4_linear import Fp4Linear
from llmd_plugins.quantization.mxfp4 import Mxfp4Config, is_mxfp4
from llmd_plugins.quantization.settings import by_parts

_GROUP_SIZE = 32


class Mxfp4:
    """Every linear but those that `modules_to_not_convert` names."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._config = Mxfp4Config(settings) if is_mxfp4(settings) else None

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return is_mxfp4(settings)

    def method(self, layer: Linear) -> QuantMethod | None:
        assert self._config is not None
        return by_parts(layer, self._config.is_quantized, lambda _: Mxfp4Linear())


class Mxfp4Linear(Fp4Linear):
    """One linear, or merged parts."""

    def __init__(self) -> None:
        super().__init__("weight_blocks", "weight_scales", None, _GROUP_SIZE)

    def create_weights(self, layer: Linear) -> None:
        super().create_weights(layer)
        layer.take(self._packed)
        shape = (layer.out_features, layer.in_features // _GROUP_SIZE, _GROUP_SIZE // 2)
        layer.add_weight(self._packed, shape, torch.uint8)

    def finish_weights(self, layer: Linear) -> None:
        blocks = layer._parameters[self._packed]
        if blocks is None or blocks.is_meta:
            raise ModelError(f"the checkpoint lacks tensor {layer.checkpoint_names[0]}.{self._packed}")
        layer._parameters[self._packed] = nn.Parameter(blocks.data.flatten(1), requires_grad=False)
        super().finish_weights(layer)
