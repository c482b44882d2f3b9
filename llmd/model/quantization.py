"""How a linear's weight is stored and applied: the protocols of quantization plugins, and the method that does nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from llmd.errors import ModelError
from llmd_kernels.linear import gated_linear, linear

if TYPE_CHECKING:
    from llmd.model.layers.embedding import Embedding
    from llmd.model.layers.linear import Activation, Linear


class QuantMethod(Protocol):
    """Owns the parameters of the linears that it is given.

    A method that can also give a weight back, [out, in] in any float dtype, has a `dense_weight(layer)`: DoRA needs it.
    One that can apply a gated activation in the same go has `apply_activated(layer, x, activation)`.
    One whose `finish_weights` takes time has `packed_facts(layer)` → a dict of what JSON can say of the packed weight, and
    `restore_weights(layer, facts)`, called instead of `finish_weights` at a later start: the
    parameters and buffers that it left are back, and so are the facts. One that computes with what was loaded says
    `keeps_weights = True`. One whose weight is of a format that `llmd_kernels.experts` multiplies gives it, without a bias,
    by `expert_weight(layer)`: then the experts of a layer are computed all at once.
    """

    def create_weights(self, layer: Linear) -> None:
        """Declare what the checkpoint holds for this layer, by `layer.add_weight`."""

    def finish_weights(self, layer: Linear) -> None:
        """All parts have arrived: repack or quantize, and drop what is not needed any more."""

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] → [T, out_features] in x's dtype."""


class TableMethod(Protocol):
    """Owns the table of an embedding, which a tied head shares. It loads as `weight`, whole and dense."""

    def finish_weights(self, layer: Embedding) -> None:
        """The table has arrived: quantize it, and drop the original."""

    def rows(self, layer: Embedding, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 → [T, hidden_size] in the layer's dtype."""

    def logits(self, layer: Embedding, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size] → [N, vocab_size] float32."""

    def dense_weight(self, layer: Embedding) -> torch.Tensor:
        """[vocab_size, hidden_size] in any float dtype."""


class Quantization(Protocol):
    """One quantization scheme of one checkpoint.

    `ignored_weights`, where it has that attribute, are patterns of tensors in the checkpoint that nothing reads. Where it
    has a `head_method(layer)`, that is asked for an untied output head, given as a linear; without it the head is a table.
    Where it has a `table_method(layer)`, that is asked for the embedding of tokens, and may answer None.
    """

    def detect(self, settings: Mapping[str, Any]) -> bool:
        """Whether config.json's quantization_config is of this scheme."""

    def method(self, layer: Linear) -> QuantMethod | None:
        """The method for a linear, by its `checkpoint_names` or shape; None leaves it unquantized.

        Where the parts of a merged linear are stored in different ways, PartMethods of one for each.
        """


class Unquantized:
    """The weight as it is."""

    keeps_weights = True

    def create_weights(self, layer: Linear) -> None:
        """weight [out, in] and, where there is one, bias [out]."""
        add_dense_weights(layer)

    def finish_weights(self, layer: Linear) -> None:
        """Nothing to do."""

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ + b."""
        return linear(x, layer.weight, layer.bias)

    def apply_activated(self, layer: Linear, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """act(x Wᵀ + b), W being gates and ups."""
        return gated_linear(x, layer.weight, layer.bias, activation)

    def dense_weight(self, layer: Linear) -> torch.Tensor:
        """The weight."""
        return layer.weight

    def expert_weight(self, layer: Linear) -> torch.Tensor:
        """The weight."""
        return layer.weight


class PartMethods:
    """A method for each part of a merged linear, None for a plain one: each part is kept and applied apart."""

    def __init__(self, methods: Sequence[QuantMethod | None]) -> None:
        self.methods = [method or Unquantized() for method in methods]

    def create_weights(self, layer: Linear) -> None:
        """Make a linear of each part, and have its method declare its weights."""
        layer.pieces = nn.ModuleList(layer.part_linears())
        for piece, method in zip(self._pieces(layer), self.methods, strict=True):
            piece.method = method
            method.create_weights(piece)

    def finish_weights(self, layer: Linear) -> None:
        """Finish each part."""
        for piece in self._pieces(layer):
            piece.finish_weights()

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """The parts' outputs beside each other."""
        return torch.cat([piece.method.apply(piece, x) for piece in self._pieces(layer)], dim=1)

    def dense_weight(self, layer: Linear) -> torch.Tensor:
        """The parts' weights under each other; ModelError where a part's method cannot give its own back."""
        return torch.cat([_dense_weight(piece).float() for piece in self._pieces(layer)])

    def _pieces(self, layer: Linear) -> Sequence[Linear]:
        return layer.pieces  # type: ignore[return-value]


def _dense_weight(layer: Linear) -> torch.Tensor:
    dense = getattr(layer.method, "dense_weight", None)
    if dense is None:
        raise ModelError(f"{layer.name}: {type(layer.method).__name__} cannot give its weight back")
    weight: torch.Tensor = dense(layer)
    return weight


def add_dense_weights(layer: Linear) -> None:
    """Declare weight [out, in] and, where the layer has one, bias [out]."""
    layer.add_weight("weight", (layer.out_features, layer.in_features), layer.dtype)
    if layer.has_bias:
        layer.add_weight("bias", (layer.out_features,), layer.dtype, input_dim=None)
    else:
        layer.register_parameter("bias", None)
