"""ModelOpt's tensors: FP8 weight, weight_scale and input_scale; NVFP4 weight uint8 [N, K / 2], weight_scale e4m3
[N, K / 16], weight_scale_2 for the tensor, input_scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmd.api.v1 import Linear, QuantMethod
from llmd_plugins.quantization.fp4_linear import Fp4Linear
from llmd_plugins.quantization.fp8_linear import Fp8Layout, Fp8Linear
from llmd_plugins.quantization.modelopt import ModelOptConfig, is_modelopt
from llmd_plugins.quantization.settings import by_parts

_FP8 = Fp8Layout(("weight_scale",), ("input_scale",))


class ModelOpt:
    """Every linear, the head too, but those that `ignore` or `exclude_modules` name."""

    ignored_weights = ("*.k_scale", "*.v_scale", "*.q_scale")  # of a quantized KV cache

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._config = ModelOptConfig(settings) if is_modelopt(settings) else None

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return is_modelopt(settings)

    def method(self, layer: Linear) -> QuantMethod | None:
        assert self._config is not None
        return by_parts(layer, self._config.is_quantized, self._one)

    def head_method(self, layer: Linear) -> QuantMethod | None:
        return self.method(layer)

    def _one(self, _: bool) -> QuantMethod:
        assert self._config is not None
        if self._config.is_fp4:
            return Fp4Linear("weight", "weight_scale", "weight_scale_2", self._config.group_size or 0, divides=False)
        return Fp8Linear(_FP8)
