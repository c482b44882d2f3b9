"""GPTQ's tensors: qweight int32 [K · bits / 32, N], codes one after another along K; qzeros int32 [G, N · bits / 32]
along N; scales [G, N]; g_idx [K], each input feature's group. W[n, k] = (q - zero) · scale.

Format: https://github.com/ModelCloud/GPTQModel/blob/main/gptqmodel/nn_modules/qlinear/__init__.py (pack_block).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmd.api.v1 import Linear, ModelError, QuantMethod
from llmd_plugins.quantization.gptq import GptqConfig, GptqScheme, is_gptq
from llmd_plugins.quantization.settings import by_parts
from llmd_plugins.quantization.stored import Grouped, add_bias, finish_bias, keep_codes, taken, taken_scale, unpack_words


class Gptq:
    """Gives each linear what `dynamic`, skip lists and defaults say of it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._config = GptqConfig(settings) if is_gptq(settings) else None

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return is_gptq(settings)

    def method(self, layer: Linear) -> QuantMethod | None:
        assert self._config is not None
        return by_parts(layer, self._config.scheme, GptqLinear)

    def head_method(self, layer: Linear) -> QuantMethod | None:
        assert self._config is not None
        return self.method(layer) if self._config.has_head else None


class GptqLinear(Grouped):
    """One linear, or merged parts of one scheme."""

    def __init__(self, scheme: GptqScheme) -> None:
        self._scheme = scheme

    def create_weights(self, layer: Linear) -> None:
        bits, rows, columns = self._scheme.bits, layer.in_features, layer.out_features
        if rows * bits % 32 or any(part.rows.size * bits % 32 for part in layer.parts):
            shape = f"[{columns}, {rows}]"
            raise ModelError(
                f"tensor {layer.checkpoint_names[0]}.qweight: {bits}-bit codes of {shape} do not fill 32-bit words"
            )
        whole, group = layer.columns.full, self._group_size(layer)
        is_split = not self._scheme.desc_act and group < whole  # every rank needs all groups where their order is free
        num_groups = -(-(rows if is_split else whole) // group)
        by_group: dict[str, Any] = {
            "output_dim": 1, "input_dim": 0 if is_split else None, "input_block": group if is_split else None,
        }  # fmt: skip
        layer.add_weight("qweight", (rows * bits // 32, columns), torch.int32, output_dim=1, input_dim=0)
        layer.add_weight("qzeros", (num_groups, columns * bits // 32), torch.int32, **by_group)
        layer.add_weight("scales", (num_groups, columns), torch.float32, **by_group)
        layer.add_part_weight("g_idx", (rows,), torch.int32, input_dim=0, default=-1)
        add_bias(layer)

    def finish_weights(self, layer: Linear) -> None:
        bits, group = self._scheme.bits, self._group_size(layer)
        scale = taken_scale(layer, "scales", 1).T.contiguous()
        zeros = unpack_words(taken(layer, "qzeros"), bits, layer.out_features).T.to(torch.int32)
        zeros = zeros + 1 if self._scheme.zeros_less_one else zeros
        groups = self._groups(layer, layer.take("g_idx"), group, scale.shape[1])
        finish_bias(layer)
        codes = unpack_words(taken(layer, "qweight").T.contiguous(), bits, layer.in_features)
        keep_codes(layer, codes, scale, zeros, bits, group, groups)

    def _group_size(self, layer: Linear) -> int:
        return min(self._scheme.group_size or layer.columns.full, layer.columns.full)

    def _groups(self, layer: Linear, g_idx: Tensor | None, group: int, num_groups: int) -> Tensor | None:
        """[num_parts, K], each input feature's group; None where they are in order."""
        if g_idx is None:
            if self._scheme.desc_act and num_groups > 1:
                raise ModelError(f"the checkpoint lacks tensor {layer.checkpoint_names[0]}.g_idx, which desc_act needs")
            return None
        first = layer.columns.start // group if not self._scheme.desc_act else 0
        in_order = torch.arange(g_idx.shape[1], device=g_idx.device, dtype=g_idx.dtype) // group
        groups = torch.where(g_idx[:, :1] == -1, in_order, g_idx - first)
        return None if bool((groups == in_order).all()) else groups
