"""HQQ's tensors: W [N, K] is seen as [R, group], R = N · K / group. W_q holds its codes, rows of a half, a quarter or a
tenth of R one over the other in each byte or int32, the first in the highest bits; scale and zero [R, 1] are floats.
W = (code - zero) · scale.

Format: https://github.com/mobiusml/hqq/blob/master/hqq/core/bitpack.py and quantize.py (state_dict).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmd.api.v1 import Linear, ModelError, QuantMethod
from llmd_plugins.quantization.hqq import HqqConfig, HqqScheme, is_hqq
from llmd_plugins.quantization.settings import by_parts
from llmd_plugins.quantization.stored import Grouped, add_bias, finish_bias, keep_codes, taken, taken_scale

_STORED_FACTS = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "compute_dtype", "quant_scale",
    "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
_CODES_A_WORD = {8: 1, 4: 2, 3: 10, 2: 4}


class Hqq:
    """Every linear but those that `skip_modules` or `quant_config` leave out."""

    ignored_weights = tuple(f"*.{name}" for name in _STORED_FACTS)  # what the config says, again beside each weight

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._config = HqqConfig(settings) if is_hqq(settings) else None

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return is_hqq(settings)

    def method(self, layer: Linear) -> QuantMethod | None:
        assert self._config is not None
        return by_parts(layer, self._config.scheme, HqqLinear, apart=True)


class HqqLinear(Grouped):
    """One linear that a rank has whole: its codes are strewn over all of W_q."""

    def __init__(self, scheme: HqqScheme) -> None:
        self._scheme = scheme

    def create_weights(self, layer: Linear) -> None:
        [part], name = layer.parts, layer.checkpoint_names[0]
        if part.rows.size != part.rows.full or layer.columns.size != layer.columns.full:
            raise ModelError(f"tensor {name}.W_q cannot be divided among ranks")
        group, rows = self._sizes(layer)
        if layer.in_features % group:
            raise ModelError(f"tensor {name}.W_q: {layer.in_features} inputs are no whole groups of {group}")
        words = -(-rows // _CODES_A_WORD[self._scheme.bits])
        dtype = torch.int32 if self._scheme.bits == 3 else torch.uint8
        layer.add_weight("W_q", (words, group), dtype, output_dim=None, input_dim=None)
        for side in ("scale", "zero"):
            layer.add_weight(side, (rows, 1), torch.float32, output_dim=None, input_dim=None)
        add_bias(layer)

    def finish_weights(self, layer: Linear) -> None:
        group, rows = self._sizes(layer)
        scale = taken_scale(layer, "scale").view(layer.out_features, -1)
        zeros = taken(layer, "zero").view(scale.shape)
        if not bool(zeros.isfinite().all()):
            raise ModelError(f"tensor {layer.checkpoint_names[0]}.zero holds NaN or infinity")
        finish_bias(layer)
        codes = _codes(taken(layer, "W_q"), self._scheme.bits)[:rows].reshape(layer.out_features, layer.in_features)
        keep_codes(layer, codes, scale, zeros, self._scheme.bits, group)

    def _sizes(self, layer: Linear) -> tuple[int, int]:
        """Inputs of a group, and groups of the whole weight."""
        group = self._scheme.group_size or layer.in_features
        return group, layer.out_features * (layer.in_features // group)


def _codes(words: Tensor, bits: int) -> Tensor:
    """[W, group] → uint8 [W · codes a word, group]."""
    count = _CODES_A_WORD[bits]
    return torch.cat(
        [((words >> (bits * (count - 1 - place))) & ((1 << bits) - 1)).to(torch.uint8) for place in range(count)]
    )
