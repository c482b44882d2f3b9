"""AWQ's tensors: qweight int32 [K, N / 8] and qzeros int32 [G, N / 8], eight outputs a word; scales [G, N].
W[n, k] = (q - zero) · scale. Within a word the outputs lie, from the lowest bits on, in the order 0 2 4 6 1 3 5 7.

Format: https://github.com/casper-hansen/AutoAWQ/blob/main/awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmd.api.v1 import Linear, ModelError, QuantMethod
from llmd_plugins.quantization.awq import AwqConfig, is_awq
from llmd_plugins.quantization.settings import by_parts
from llmd_plugins.quantization.stored import Grouped, add_bias, finish_bias, keep_codes, taken, taken_scale

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq:
    """Every linear but those that `modules_to_not_convert` names."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._config = AwqConfig(settings) if is_awq(settings) else None

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return is_awq(settings)

    def method(self, layer: Linear) -> QuantMethod | None:
        config = self._config
        assert config is not None
        return by_parts(layer, config.is_quantized, lambda _: AwqLinear(config))

    def head_method(self, layer: Linear) -> QuantMethod | None:
        assert self._config is not None
        return self.method(layer) if self._config.has_head else None


class AwqLinear(Grouped):
    """One linear, or merged parts."""

    def __init__(self, config: AwqConfig) -> None:
        self._config = config

    def create_weights(self, layer: Linear) -> None:
        rows, columns, whole = layer.in_features, layer.out_features, layer.columns.full
        if any(part.rows.size % 8 for part in layer.parts):
            raise ModelError(f"tensor {layer.checkpoint_names[0]}.qweight: {columns} outputs do not fill words of 8")
        group = self._group_size(layer)
        by_group: dict[str, Any] = {"output_dim": 1, "input_dim": 0, "input_block": group}
        if group == whole:
            by_group = {"output_dim": 1, "input_dim": None}
        num_groups = -(-rows // group)
        layer.add_weight("qweight", (rows, columns // 8), torch.int32, output_dim=1, input_dim=0)
        default = None if self._config.has_zeros else 0.0
        layer.add_weight("qzeros", (num_groups, columns // 8), torch.int32, default=default, **by_group)
        layer.add_weight("scales", (num_groups, columns), torch.float32, **by_group)
        add_bias(layer)

    def finish_weights(self, layer: Linear) -> None:
        scale = taken_scale(layer, "scales", 1).T.contiguous()
        packed = layer.take("qzeros") if not self._config.has_zeros else taken(layer, "qzeros")
        zeros = 8 if packed is None else _codes(packed).to(torch.int32)
        finish_bias(layer)
        keep_codes(layer, _codes(taken(layer, "qweight")), scale, zeros, 4, self._group_size(layer))

    def _group_size(self, layer: Linear) -> int:
        return min(self._config.group_size or layer.columns.full, layer.columns.full)


def _codes(words: Tensor) -> Tensor:
    """int32 [R, N / 8] → uint8 [N, R]."""
    codes = torch.empty(words.shape[1] * 8, words.shape[0], dtype=torch.uint8, device=words.device)
    for nibble, output in enumerate(_ORDER):
        codes[output::8] = ((words >> (4 * nibble)) & 15).to(torch.uint8).T
    return codes
