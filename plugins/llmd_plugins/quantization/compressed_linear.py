"""compressed-tensors' linears. Integers are packed, W = (q - zero) · scale with q int32 words along K and zero points along
N, or one a byte; floats are one a byte, or two with a scale for each 16 or 32.

Format: https://github.com/vllm-project/compressed-tensors/tree/main/src/compressed_tensors/compressors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmd.api.v1 import Linear, ModelError, QuantMethod
from llmd_kernels.int8_linear import pack
from llmd_plugins.quantization.compressed_tensors import CompressedConfig, WeightScheme, is_compressed
from llmd_plugins.quantization.fp4_linear import Fp4Linear
from llmd_plugins.quantization.fp8_linear import Fp8Layout, Fp8Linear
from llmd_plugins.quantization.int8_linear import Int8Linear
from llmd_plugins.quantization.online import keep_int8
from llmd_plugins.quantization.settings import by_parts
from llmd_plugins.quantization.stored import (
    Grouped,
    add_bias,
    check_scale,
    finish_bias,
    keep_codes,
    taken,
    taken_scale,
    unpack_words,
)


class Compressed:
    """Gives each linear what the groups' targets and the ignore list say of it."""

    ignored_weights = ("*.k_scale", "*.v_scale", "*.q_scale", "*.k_zero_point", "*.v_zero_point")  # of a quantized KV cache

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._config = CompressedConfig(settings) if is_compressed(settings) else None

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return is_compressed(settings)

    def method(self, layer: Linear) -> QuantMethod | None:
        assert self._config is not None
        schemes = [self._config.scheme(name) for name in layer.checkpoint_names]
        apart = any(scheme is not None and _is_apart(layer, scheme) for scheme in schemes)
        return by_parts(layer, self._config.scheme, _method, apart=apart)

    def head_method(self, layer: Linear) -> QuantMethod | None:
        return self.method(layer)


def _is_apart(layer: Linear, scheme: WeightScheme) -> bool:
    """Whether parts that are stored alike still cannot lie in one matrix: entries would stand for outputs of two."""
    unit = 32 if scheme.format == "pack-quantized" and not scheme.symmetric else scheme.block[0] if scheme.block else 1
    return any(part.rows.size % unit for part in layer.parts)


def _method(scheme: WeightScheme) -> QuantMethod:
    if scheme.format == "pack-quantized":
        return Packed(scheme)
    if scheme.type == "float" and scheme.bits == 4:
        is_mx = scheme.format.startswith("mx")
        return Fp4Linear("weight_packed", "weight_scale", None if is_mx else "weight_global_scale", scheme.group_size or 0)
    if scheme.type == "float":
        names = ("input_scale",) if scheme.input_bits is not None else ()
        return Fp8Linear(
            Fp8Layout(("weight_scale",), names, scheme.block, scheme.strategy == "channel", scheme.input_bits == 8)
        )
    if scheme.input_bits is not None and scheme.symmetric and scheme.strategy in ("tensor", "channel"):
        return WholeInts(scheme)
    return GroupedInts(scheme)


def _fp8_layout(scheme: WeightScheme) -> Fp8Layout:
    names = ("input_scale",) if scheme.input_bits is not None else ()
    return Fp8Layout(("weight_scale",), names, scheme.block, scheme.strategy == "channel", scheme.input_bits == 8)


def _num_groups(layer: Linear, scheme: WeightScheme) -> tuple[int, int]:
    """Input features that share a scale, and how many scales a row of this rank has."""
    whole = layer.columns.full
    group = min(scheme.group_size or whole, whole)
    return group, -(-(layer.in_features if group < whole and not scheme.act_order else whole) // group)


def _add_scale(layer: Linear, scheme: WeightScheme) -> None:
    group, num_groups = _num_groups(layer, scheme)
    if scheme.strategy == "tensor":
        layer.add_part_weight("weight_scale", (1,), torch.float32)
    elif group == layer.columns.full or scheme.act_order:
        layer.add_weight("weight_scale", (layer.out_features, num_groups), torch.float32, input_dim=None)
    else:
        layer.add_weight("weight_scale", (layer.out_features, num_groups), torch.float32, input_block=group)


def _take_scale(layer: Linear, scheme: WeightScheme) -> Tensor:
    """[N, G] float32."""
    if scheme.strategy != "tensor":
        return taken_scale(layer, "weight_scale").contiguous()
    rows = torch.tensor([part.rows.size for part in layer.parts], device=layer.device)
    return taken_scale(layer, "weight_scale", None).repeat_interleave(rows, 0)


class Packed(Grouped):
    """weight_packed int32 [N, K · bits / 32], weight_scale, weight_zero_point int32 [N · bits / 32, G], weight_g_idx [K]."""

    def __init__(self, scheme: WeightScheme) -> None:
        self._scheme = scheme

    def create_weights(self, layer: Linear) -> None:
        bits, rows = self._scheme.bits, layer.out_features
        group, num_groups = _num_groups(layer, self._scheme)
        layer.add_weight("weight_packed", (rows, -(-layer.in_features * bits // 32)), torch.int32)
        layer.add_part_weight("weight_shape", (2,), torch.int64, default=-1)
        _add_scale(layer, self._scheme)
        if not self._scheme.symmetric:
            is_split = group < layer.columns.full and not self._scheme.act_order
            layer.add_weight(
                "weight_zero_point", (-(-rows * bits // 32), num_groups), torch.int32,
                input_dim=1 if is_split else None, input_block=group if is_split else None,
            )  # fmt: skip
        if self._scheme.act_order:
            layer.add_part_weight("weight_g_idx", (layer.in_features,), torch.int32, input_dim=0)
        add_bias(layer)

    def finish_weights(self, layer: Linear) -> None:
        bits = self._scheme.bits
        self._check_shape(layer, layer.take("weight_shape"))
        scale = _take_scale(layer, self._scheme)
        zeros: Tensor | int = 1 << (bits - 1)
        if not self._scheme.symmetric:
            words = taken(layer, "weight_zero_point")
            zeros = unpack_words(words.T.contiguous(), bits, layer.out_features).T.to(torch.int32)
        groups = taken(layer, "weight_g_idx") if self._scheme.act_order else None
        finish_bias(layer)
        codes = unpack_words(taken(layer, "weight_packed"), bits, layer.in_features)
        keep_codes(layer, codes, scale, zeros, bits, _num_groups(layer, self._scheme)[0], groups)

    def _check_shape(self, layer: Linear, shapes: Tensor | None) -> None:
        if shapes is None:
            return
        for part, name, shape in zip(layer.parts, layer.checkpoint_names, shapes.tolist(), strict=True):
            expected = [part.rows.full, layer.columns.full]
            if shape not in (expected, [-1, -1]):
                raise ModelError(f"tensor {name}.weight_shape says {shape}, config.json asks for {expected}")


class WholeInts(Int8Linear):
    """weight int8 [N, K] with a scale for each output or for all; inputs are quantized by token when used.

    Scales of inputs that a checkpoint measured (input_scale) are not needed: a token's own are at least as close.
    """

    def __init__(self, scheme: WeightScheme) -> None:
        self._scheme = scheme

    def create_weights(self, layer: Linear) -> None:
        layer.add_weight("weight", (layer.out_features, layer.in_features), torch.int8)
        _add_scale(layer, self._scheme)
        _add_input_scale(layer)
        add_bias(layer)

    def finish_weights(self, layer: Linear) -> None:
        _drop_input_scale(layer)
        finish_bias(layer)
        keep_int8(layer, pack(taken(layer, "weight"), _take_scale(layer, self._scheme).flatten()))


class GroupedInts(Grouped):
    """weight int8 [N, K] with scales, and maybe zero points, by groups, outputs or for all; inputs stay as they are."""

    def __init__(self, scheme: WeightScheme) -> None:
        self._scheme = scheme

    def create_weights(self, layer: Linear) -> None:
        layer.add_weight("weight", (layer.out_features, layer.in_features), torch.int8)
        _add_scale(layer, self._scheme)
        if not self._scheme.symmetric:
            group, num_groups = _num_groups(layer, self._scheme)
            if self._scheme.strategy == "tensor":
                layer.add_part_weight("weight_zero_point", (1,), torch.int8)
            else:
                block = group if group < layer.columns.full else None
                layer.add_weight(
                    "weight_zero_point", (layer.out_features, num_groups), torch.int8,
                    input_dim=None if block is None else 1, input_block=block,
                )  # fmt: skip
        _add_input_scale(layer)
        add_bias(layer)

    def finish_weights(self, layer: Linear) -> None:
        _drop_input_scale(layer)
        zeros: Tensor | int = 128
        if not self._scheme.symmetric:
            zeros = taken(layer, "weight_zero_point").to(torch.int32) + 128
            if self._scheme.strategy == "tensor":
                rows = torch.tensor([part.rows.size for part in layer.parts], device=layer.device)
                zeros = zeros.repeat_interleave(rows, 0)
        scale = _take_scale(layer, self._scheme)
        finish_bias(layer)
        codes = (taken(layer, "weight").view(torch.uint8)) ^ 128
        keep_codes(layer, codes, scale, zeros, 8, _num_groups(layer, self._scheme)[0])


def _add_input_scale(layer: Linear) -> None:
    """What a checkpoint measured of its inputs, which may be missing where they are quantized as they come."""
    layer.add_part_weight("input_scale", (1,), torch.float32, default=1.0)
    layer.add_part_weight("input_zero_point", (1,), torch.int8, default=0.0)


def _drop_input_scale(layer: Linear) -> None:
    layer.take("input_zero_point")
    scale = layer.take("input_scale")
    if scale is not None:
        check_scale(layer, "input_scale", scale, None)
