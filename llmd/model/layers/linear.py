"""Linears: one matrix, or several of the checkpoint merged into one so that a step launches fewer, bigger kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from llmd.model.layers.parameters import Layer, Shard, Slice, WeightSlot, copy_into

if TYPE_CHECKING:
    from llmd.model.quantization import QuantMethod


class Part(NamedTuple):
    """One linear of the checkpoint within a merged one: its name beside the merged layer, and its rows."""

    name: str
    rows: Slice


class _Layout(NamedTuple):
    """Which dims of a parameter run over output and input features; None: it has no such dim."""

    output_dim: int | None
    input_dim: int | None


class Linear(Layer):
    """y = x Wᵀ + b over this rank's slice. How W is stored and applied is the QuantMethod's affair."""

    method: QuantMethod
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        parts: Sequence[Part],
        columns: Slice,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        reduce: Shard | None = None,
    ) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.columns = columns
        self.has_bias = bias
        self.dtype = dtype
        self.device = device
        self.reduce = reduce  # set where the input is split: partial sums are added up
        self.in_features = columns.size
        self.out_features = sum(part.rows.size for part in parts)
        self._layouts: dict[str, _Layout] = {}

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        """The names of its parts in the checkpoint."""
        folder = self.name.rpartition(".")[0]
        return tuple(f"{folder}.{part.name}".lstrip(".") for part in self.parts) if self.parts[0].name else (self.name,)

    def add_weight(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, *, output_dim: int | None = 0, input_dim: int | None = 1
    ) -> None:
        """Declare a parameter of this rank's shape for a QuantMethod; merged parts lie one after another on output_dim.

        A dim smaller than the features it runs over is taken as packed or grouped by the ratio.
        """
        self.add_parameter(name, shape, dtype)
        self._layouts[name] = _Layout(output_dim, input_dim)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """For each part each parameter: `<part>.<parameter>`."""
        for name in self._layouts:
            offset = 0
            for part, checkpoint_name in zip(self.parts, self.checkpoint_names, strict=True):
                slot = self._slot(name, part, checkpoint_name, offset)
                offset += part.rows.size
                yield slot

    def _slot(self, name: str, part: Part, checkpoint_name: str, offset: int) -> WeightSlot:
        parameter = self._parameters[name]
        assert parameter is not None
        output_dim, input_dim = self._layouts[name]
        shape = list(parameter.shape)
        cuts: list[tuple[int, Slice]] = []  # what to take of the checkpoint's tensor
        place: tuple[int, int, int] | None = None  # where it goes: dim, start, size
        if output_dim is not None:
            ratio = self.out_features // shape[output_dim]
            rows = part.rows.scaled(ratio)
            shape[output_dim] = rows.full
            cuts.append((output_dim, rows))
            place = (output_dim, offset // ratio, rows.size)
        if input_dim is not None and input_dim < len(shape):
            columns = self.columns.scaled(self.in_features // shape[input_dim])
            shape[input_dim] = columns.full
            cuts.append((input_dim, columns))
        return WeightSlot(f"{checkpoint_name}.{name}", tuple(shape), self._part_loader(name, cuts, place))

    def _part_loader(
        self, name: str, cuts: list[tuple[int, Slice]], place: tuple[int, int, int] | None
    ) -> Callable[[torch.Tensor], None]:
        def load(tensor: torch.Tensor) -> None:
            target = self.materialize(name)
            for dim, cut in cuts:
                tensor = tensor.narrow(dim, cut.start, cut.size)
            copy_into(target if place is None else target.narrow(*place), tensor)

        return load

    def finish_weights(self) -> None:
        """Let the method turn what was loaded into what it computes with."""
        if self.reduce is not None and self.reduce.rank and self.bias is not None:
            self.bias.zero_()  # added once, by the first rank
        self.method.finish_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] → [T, out_features]."""
        y = self.method.apply(self, x)
        return y if self.reduce is None else self.reduce.reduce(y)
