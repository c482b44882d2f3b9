"""bitsandbytes' tensors of a linear. Four bits: weight uint8 [N · K / 2, 1], two codes a byte, the first in the high half;
weight.quant_map, what the 16 codes stand for; weight.absmax, a scale for each block of codes, row behind row; and
weight.quant_state, JSON as bytes. Scales may be codes again, of weight.nested_quant_map by weight.nested_absmax.
Eight bits: weight int8 [N, K] and SCB [N], each row's largest value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmd.api.v1 import Linear, ModelError, PartMethods, QuantMethod
from llmd_kernels.codebook_linear import pack
from llmd_kernels.int8_linear import pack as pack_int8
from llmd_plugins.quantization.bitsandbytes import BitsAndBytesConfig, is_bitsandbytes
from llmd_plugins.quantization.int8_linear import Int8Linear
from llmd_plugins.quantization.nf4_linear import CodebookLinear
from llmd_plugins.quantization.online import keep_int8
from llmd_plugins.quantization.settings import by_parts, is_among
from llmd_plugins.quantization.stored import add_bias, finish_bias, taken, taken_scale

_MAX_STATE_BYTES = 4096


class BitsAndBytes:
    """Every linear but those that `llm_int8_skip_modules` names; the head is never quantized unless told so."""

    ignored_weights = ("*.weight_format",)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._config = BitsAndBytesConfig(settings) if is_bitsandbytes(settings) else None

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return is_bitsandbytes(settings)

    def method(self, layer: Linear) -> QuantMethod | None:
        config = self._config
        assert config is not None

        def choose(name: str) -> bool | None:
            return None if is_among(name, config.skipped) else True

        if not config.has_four_bits:
            return by_parts(layer, choose, lambda _: StoredInt8Linear())
        if len(layer.parts) > 1:
            return PartMethods([FourBitLinear(config) if choose(name) else None for name in layer.checkpoint_names])
        return by_parts(layer, choose, lambda _: FourBitLinear(config))


class FourBitLinear(CodebookLinear):
    """One linear; merged ones are taken apart, as each has its own description."""

    def __init__(self, config: BitsAndBytesConfig) -> None:
        self._config = config

    def create_weights(self, layer: Linear) -> None:
        if layer.columns.full != layer.in_features or layer.parts[0].rows.full != layer.out_features:
            raise ModelError(f"tensor {layer.name}.weight: bitsandbytes' blocks cannot be divided among ranks")
        self._num_bytes = -(-layer.out_features * layer.in_features // 2)
        layer.add_weight("weight", (self._num_bytes, 1), torch.uint8, output_dim=None, input_dim=None)
        is_nested = self._config.has_nested_scales
        layer.add_list("absmax", "weight.absmax", torch.uint8 if is_nested else torch.float32)
        layer.add_list("quant_map", "weight.quant_map", torch.float32)
        layer.add_list("state", f"weight.quant_state.bitsandbytes__{self._config.kind}", torch.uint8)
        if is_nested:
            layer.add_list("nested_absmax", "weight.nested_absmax", torch.float32)
            layer.add_list("nested_quant_map", "weight.nested_quant_map", torch.float32)
        add_bias(layer)

    def finish_weights(self, layer: Linear) -> None:
        state = _State(layer, taken(layer, "state"))
        scale = self._scale(layer, state)
        codebook = taken(layer, "quant_map")
        if codebook.shape != (16,) or not bool(codebook.isfinite().all()):
            raise ModelError(f"tensor {layer.name}.weight.quant_map must be 16 numbers")
        finish_bias(layer)
        codes = taken(layer, "weight").view(layer.out_features, -1)
        codes = torch.stack((codes >> 4, codes & 15), dim=2).flatten(1)
        self.keep(layer, pack(codes, scale, codebook, group_size=state.block))

    def _scale(self, layer: Linear, state: _State) -> Tensor:
        """float32 [N, K / block]."""
        shape = (layer.out_features, layer.in_features // state.block)
        scale, name = taken(layer, "absmax"), "weight.absmax"
        if scale.numel() != shape[0] * shape[1]:
            raise ModelError(f"tensor {layer.name}.{name} holds {scale.numel()} scales, blocks are {shape[0] * shape[1]}")
        if self._config.has_nested_scales:
            outer, values = taken(layer, "nested_absmax"), taken(layer, "nested_quant_map")
            if values.shape != (256,) or outer.numel() != -(-scale.numel() // state.nested_block):
                raise ModelError(f"tensor {layer.name}.weight.nested_absmax and nested_quant_map do not fit weight.absmax")
            index = torch.arange(scale.numel(), device=scale.device) // state.nested_block
            scale = values[scale.int()] * outer[index] + state.nested_offset
        scale = scale.view(shape)
        if not bool((scale.isfinite() & (scale >= 0)).all()):  # a block of zeros has a scale of 0
            raise ModelError(f"tensor {layer.name}.{name} holds a scale that is negative or no finite number")
        return scale


class _State:
    """The description that comes with a weight. Raises ModelError where it and the weight disagree."""

    def __init__(self, layer: Linear, raw: Tensor) -> None:
        name = f"tensor {layer.name}.weight.quant_state"
        try:
            facts = json.loads(bytes(raw[:_MAX_STATE_BYTES].tolist()))
            self.block = int(facts["blocksize"])
            shape = [int(size) for size in facts["shape"]]
            self.nested_block = int(facts.get("nested_blocksize", 256))
            self.nested_offset = float(facts.get("nested_offset", 0.0))
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{name} cannot be read: {error!r}") from None
        if shape != [layer.out_features, layer.in_features]:
            raise ModelError(f"{name} is of shape {shape}, config.json asks for {[layer.out_features, layer.in_features]}")
        if self.block < 1 or self.nested_block < 1 or layer.in_features % self.block or layer.in_features % 2:
            raise ModelError(f"{name}: rows of {layer.in_features} do not divide into blocks of {self.block}")


class StoredInt8Linear(Int8Linear):
    """LLM.int8's weights; inputs are scaled by token, without setting outliers apart."""

    def create_weights(self, layer: Linear) -> None:
        layer.add_weight("weight", (layer.out_features, layer.in_features), torch.int8)
        layer.add_weight("SCB", (layer.out_features,), torch.float32, input_dim=None)
        add_bias(layer)

    def finish_weights(self, layer: Linear) -> None:
        finish_bias(layer)
        scale = taken_scale(layer, "SCB") / 127
        keep_int8(layer, pack_int8(taken(layer, "weight"), scale))
