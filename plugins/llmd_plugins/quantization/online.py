"""Quantizing while a 16- or 32-bit checkpoint loads: which layers, and the 8-bit table of tokens that all methods share.

A layer is quantized when the last of its weights has arrived, and its original is freed: the peak is the quantized
weights, one dense layer, and what a shard needs. The table of tokens, a third of a small model's bytes, gets 8 bits with a
scale for each token whatever the linears get: fewer cost too much where logits are close.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from llmd.api.v1 import Embedding, Linear, ModelError, QuantMethod, TableMethod, add_dense_weights
from llmd_kernels.int8_linear import Int8Weight, dequantize, int8_linear, quantize, rows


class Online:
    """`make()` gives each linear its method, 8 bits serve the tables of tokens; layers that are ignored stay as they are."""

    def __init__(self, make: Callable[[], QuantMethod], options: Mapping[str, Any], *, known: Sequence[str] = ()) -> None:
        for key in options.keys() - {"ignore", *known}:
            allowed = ", ".join(("ignore", *known))
            raise ModelError(f"quantization_options has no key {key!r} for this method; allowed: {allowed}")
        self._make = make
        self._ignore = options.get("ignore", [])
        if not isinstance(self._ignore, list) or not all(isinstance(name, str) for name in self._ignore):
            raise ModelError(f"quantization_options.ignore must be a list of names of layers, got {self._ignore!r}")

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return False  # it is never how a checkpoint is stored

    def method(self, layer: Linear) -> QuantMethod | None:
        return None if layer.keeps_precision or self._is_ignored(layer.checkpoint_names) else self._make()

    def head_method(self, layer: Linear) -> QuantMethod | None:
        return None if self._is_ignored(layer.checkpoint_names) else Int8Head()

    def table_method(self, layer: Embedding) -> TableMethod | None:
        return None if self._is_ignored([layer.name]) else Int8Table()

    def _is_ignored(self, names: Sequence[str]) -> bool:
        return any(fnmatch(name, pattern) or name.endswith(f".{pattern}") for name in names for pattern in self._ignore)


class PackedInTensors:
    """Methods that leave nothing on a layer but parameters and buffers, which a later start finds as they were."""

    def packed_facts(self, layer: Linear | Embedding) -> dict[str, Any]:
        return {}

    def restore_weights(self, layer: Linear | Embedding, facts: Mapping[str, Any]) -> None:
        """The tensors are all there is."""


def keep_int8(layer: Linear | Embedding, weight: Int8Weight) -> None:
    """Make `weight` the layer's: its parameter and two buffers."""
    layer.weight = nn.Parameter(weight.packed, requires_grad=False)
    layer.register_buffer("weight_scale", weight.scale)
    layer.register_buffer("weight_sums", weight.row_sums)


def kept_int8(layer: Linear | Embedding) -> Int8Weight:
    """The layer's weight."""
    columns = layer.in_features if isinstance(layer, Linear) else layer.shape[1]
    return Int8Weight(layer.weight, buffer_of(layer, "weight_scale"), buffer_of(layer, "weight_sums"), columns)


class _Int8Rows(PackedInTensors):
    """8-bit weights with a scale and the sum of each row."""

    def finish_weights(self, layer: Linear | Embedding) -> None:
        weight = quantize(layer.weight.data)
        if not weight.scale.isfinite().all():
            raise not_finite(layer)
        keep_int8(layer, weight)

    def dense_weight(self, layer: Linear | Embedding) -> Tensor:
        return dequantize(kept_int8(layer))


class Int8Head(_Int8Rows):
    """An output head of its own."""

    def create_weights(self, layer: Linear) -> None:
        add_dense_weights(layer)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return _logits(layer, x)


class Int8Table(_Int8Rows):
    """The embedding's table, and with it a head that is tied to it."""

    def rows(self, layer: Embedding, input_ids: Tensor) -> Tensor:
        return rows(kept_int8(layer), input_ids, layer.dtype)

    def logits(self, layer: Embedding, hidden: Tensor) -> Tensor:
        return _logits(layer, hidden)


def _logits(layer: Linear | Embedding, hidden: Tensor) -> Tensor:
    """float32, whatever the dtype of the hidden states."""
    return int8_linear(hidden, kept_int8(layer), out_dtype=torch.float32)


def buffer_of(layer: nn.Module, name: str) -> Tensor:
    """A buffer that is there."""
    buffer = layer._buffers[name]
    assert buffer is not None
    return buffer


def check_scale(layer: Linear, scale: Tensor) -> None:
    """Raise ModelError unless every scale is a number: then the weights were."""
    if not scale.isfinite().all():
        raise not_finite(layer)


def not_finite(layer: Linear | Embedding) -> ModelError:
    """What to raise where a weight has no largest value."""
    names = layer.checkpoint_names if isinstance(layer, Linear) else (layer.name,)
    return ModelError(f"tensor {' or '.join(f'{name}.weight' for name in names)} holds NaN, infinity or too large numbers")
