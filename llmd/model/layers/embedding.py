"""Token ids to vectors, and vectors to logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from llmd.errors import ModelError
from llmd.model.layers.linear import Linear, Part
from llmd.model.layers.parameters import Layer, Slice, Slots, WeightSlot
from llmd_kernels.embedding import embedding
from llmd_kernels.linear import linear

if TYPE_CHECKING:
    from llmd.model.quantization import QuantMethod, TableMethod


class Embedding(Layer):
    """The table [vocab_size, hidden_size]."""

    weight: torch.Tensor

    def __init__(
        self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device, holds_tokens: bool = True
    ) -> None:
        super().__init__()
        self.device = device
        self.dtype = dtype
        self.shape = vocab_size, hidden_size
        self.holds_tokens = holds_tokens  # not positions or token types
        self.method: TableMethod | None = None  # where the table is kept quantized
        self.add_parameter("weight", (vocab_size, hidden_size), dtype)
        self.adapters: Slots | None = None  # where the model serves adapters

    @property
    def keeps_weights(self) -> bool:
        """Whether no method makes something else of the table."""
        return self.method is None

    @property
    def table(self) -> torch.Tensor:
        """[vocab_size, hidden_size]."""
        return self.weight if self.method is None else self.method.dense_weight(self).to(self.dtype)

    def finish_weights(self) -> None:
        """Let the method turn what was loaded into what it computes with."""
        if self.method is not None:
            self.method.finish_weights(self)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The products of hidden states [N, hidden_size] with every vector of the table: [N, vocab_size] float32."""
        if self.method is not None:
            return self.method.logits(self, hidden)
        return linear(hidden, self.weight, out_dtype=torch.float32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 → [T, hidden_size]."""
        y = embedding(input_ids, self.weight) if self.method is None else self.method.rows(self, input_ids)
        return y if self.adapters is None else self.adapters.add(input_ids, y)


class LMHead(Layer):
    """Hidden states to float32 logits; `tied` is the embedding whose table it shares."""

    weight: torch.Tensor

    def __init__(
        self, vocab_size: int, hidden_size: int, tied: Embedding | None, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.device = device
        self.shape = vocab_size, hidden_size
        self.dtype = dtype
        self._tied = [] if tied is None else [tied]  # in a list: not a submodule, its weight is loaded once
        self.linear: Linear | None = None  # where a checkpoint keeps the head quantized
        if tied is None:
            self.add_parameter("weight", (vocab_size, hidden_size), dtype)
        self.adapters: Slots | None = None

    @property
    def is_tied(self) -> bool:
        """Whether the embedding's table is its weight."""
        return bool(self._tied)

    @property
    def table(self) -> torch.Tensor:
        """[vocab_size, hidden_size], its own or the embedding's."""
        if self.linear is None:
            return self._tied[0].table if self._tied else self.weight
        dense = getattr(self.linear.method, "dense_weight", None)
        if dense is None:
            raise ModelError(f"{self.name}: {type(self.linear.method).__name__} cannot give its weight back")
        weight: torch.Tensor = dense(self.linear)
        return weight.to(self.dtype)

    def as_linear(self) -> Linear:
        """The linear that an untied head is, declared and without a method; `quantize` makes it the head's own."""
        rows, columns = (Slice.of(size, None, "") for size in self.shape)
        inner = Linear([Part("", rows)], columns, bias=False, dtype=self.dtype, device=self.device)
        inner.name, inner.is_piece = self.name, True
        return inner

    def quantize(self, inner: Linear, method: QuantMethod) -> None:
        """Keep the weight as this method does, instead of as a table."""
        del self._parameters["weight"]
        self.linear, inner.method = inner, method
        method.create_weights(inner)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Its own table, what its method asks for, or nothing."""
        if self.linear is not None:
            return self.linear.weight_slots()
        return iter(()) if self._tied else super().weight_slots()

    def finish_weights(self) -> None:
        """Let the method turn what was loaded into what it computes with."""
        if self.linear is not None:
            self.linear.finish_weights()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size] → [N, vocab_size] float32."""
        if self._tied:
            y = self._tied[0].logits(hidden)
        elif self.linear is None:
            y = linear(hidden, self.weight, out_dtype=torch.float32)
        else:
            y = self.linear.method.apply(self.linear, hidden).float()
        return y if self.adapters is None else self.adapters.add(hidden, y)
