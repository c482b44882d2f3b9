"""How a linear's weight is stored and applied: the protocols of quantization plugins, and the method that does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmd_kernels.linear import linear

if TYPE_CHECKING:
    from llmd.model.layers.linear import Linear


class QuantMethod(Protocol):
    """Owns the parameters of the linears that it is given."""

    def create_weights(self, layer: Linear) -> None:
        """Declare what the checkpoint holds for this layer, by `layer.add_weight`."""

    def finish_weights(self, layer: Linear) -> None:
        """All parts have arrived: repack or quantize, and drop what is not needed any more."""

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] → [T, out_features] in x's dtype."""


class Quantization(Protocol):
    """One quantization scheme of one checkpoint."""

    def detect(self, settings: Mapping[str, Any]) -> bool:
        """Whether config.json's quantization_config is of this scheme."""

    def method(self, layer: Linear) -> QuantMethod | None:
        """The method for a linear, by its `checkpoint_names` or shape; None leaves it unquantized."""


class Unquantized:
    """The weight as it is."""

    def create_weights(self, layer: Linear) -> None:
        """weight [out, in] and, where there is one, bias [out]."""
        add_dense_weights(layer)

    def finish_weights(self, layer: Linear) -> None:
        """Nothing to do."""

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b."""
        return linear(x, layer.weight, layer.bias)


def add_dense_weights(layer: Linear) -> None:
    """Declare weight [out, in] and, where the layer has one, bias [out]."""
    layer.add_weight("weight", (layer.out_features, layer.in_features), layer.dtype)
    if layer.has_bias:
        layer.add_weight("bias", (layer.out_features,), layer.dtype, input_dim=None)
    else:
        layer.register_parameter("bias", None)
