"""Linears: one matrix, or several of the checkpoint merged into one so that a step launches fewer, bigger kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from llmd.errors import ModelError
from llmd.model.layers.parameters import Layer, Shard, Slice, WeightSlot
from llmd.model.weight_memory import copy_into

if TYPE_CHECKING:
    from llmd.model.layers.parameters import Slots
    from llmd.model.quantization import QuantMethod

Activation = Callable[[torch.Tensor], torch.Tensor]  # gates and ups [T, 2·D] → [T, D]


class Part(NamedTuple):
    """One linear of the checkpoint within a merged one: its name beside the merged layer, and its rows."""

    name: str
    rows: Slice


class _Layout(NamedTuple):
    """Which dims of a parameter run over output and input features; None: it has no such dim."""

    output_dim: int | None
    input_dim: int | None
    is_stacked: bool  # the first dim runs over the parts
    output_block: int | None = None  # outputs that share an entry; None: as the shape tells
    input_block: int | None = None
    default: float | None = None  # what parts hold whose tensor the checkpoint lacks; None: it must have it


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
        self._lists: dict[str, str] = {}  # parameters of any length, by the rest of their names in the checkpoint
        self.pieces: nn.ModuleList | None = None  # linears within this one, which hold what it computes with
        self.is_piece = False  # it is within another, and nobody else's affair
        self.keeps_precision = False  # not to be quantized where the checkpoint does not say so
        self.is_routed = False  # it sees some of a step's tokens: no place for adapters
        self.adapters: Slots | None = None  # where the model serves adapters
        self.finished: Callable[[Linear], None] | None = None  # told when the weights are what it computes with

    @property
    def keeps_weights(self) -> bool:
        """As its method says; most make something else of what is loaded."""
        return bool(getattr(self.method, "keeps_weights", False))

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        """The names of its parts in the checkpoint."""
        folder = self.name.rpartition(".")[0]
        return tuple(f"{folder}.{part.name}".lstrip(".") for part in self.parts) if self.parts[0].name else (self.name,)

    def add_weight(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        output_dim: int | None = 0,
        input_dim: int | None = 1,
        output_block: int | None = None,
        input_block: int | None = None,
        default: float | None = None,
    ) -> None:
        """Declare a parameter of this rank's shape for a QuantMethod; merged parts lie one after another on output_dim.

        A dim smaller than the features it runs over is taken as packed or grouped by the ratio, or by `output_block` and
        `input_block` features for each entry, a part's last entry for fewer (see `num_blocks`). With a `default` the
        checkpoint may lack the tensor: of all parts, then `take` gives None, or of some, which then hold the default.
        """
        self.add_parameter(name, shape, dtype)
        self._layouts[name] = _Layout(output_dim, input_dim, False, output_block, input_block, default)

    def add_part_weight(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        input_dim: int | None = None,
        input_block: int | None = None,
        default: float | None = None,
    ) -> None:
        """Declare a parameter that each part has one of (a scale, an order of columns): [num_parts, *shape].

        `input_dim` counts in `shape`, as the checkpoint has it.
        """
        self.add_parameter(name, (len(self.parts), *shape), dtype)
        self._layouts[name] = _Layout(None, input_dim, True, None, input_block, default)

    def add_list(self, name: str, key: str, dtype: torch.dtype) -> None:
        """Declare a tensor of one dim and any length, `<linear>.<key>` in the checkpoint, for a linear of one part.

        What a format says of a weight may be as long as it likes; the method looks at what it then takes.
        """
        if len(self.parts) != 1:
            raise ValueError(f"{self.name}: {key} of several parts cannot be one list")
        self.add_parameter(name, (0,), dtype)
        self._lists[name] = key

    def part_linears(self) -> list[Linear]:
        """A linear for each part, named as in the checkpoint, without methods; whoever keeps them sets `pieces`."""
        linears = []
        for part, name in zip(self.parts, self.checkpoint_names, strict=True):
            rows = [Part("", part.rows)]
            linear = Linear(rows, self.columns, bias=self.has_bias, dtype=self.dtype, device=self.device, reduce=self.reduce)
            linear.name, linear.is_piece = name, True
            linears.append(linear)
        return linears

    def num_blocks(self, block: int) -> int:
        """Entries over this rank's outputs where each stands for `block` of them and no entry for two parts."""
        return sum(-(-part.rows.size // block) for part in self.parts)

    def take(self, name: str) -> torch.Tensor | None:
        """What was loaded under a declared name, which the layer lets go of; None where the checkpoint has none."""
        parameter = self._parameters.pop(name)
        self._layouts.pop(name, None)
        self._lists.pop(name, None)
        return None if parameter is None or parameter.is_meta else parameter.data

    def materialize(self, name: str) -> torch.Tensor:
        """The parameter's data, with memory; parts that the checkpoint may lack start with the default."""
        parameter = self._parameters[name]
        is_new = parameter is not None and parameter.is_meta
        data = super().materialize(name)
        default = self._layouts[name].default if name in self._layouts else None
        return data.fill_(default) if is_new and default is not None else data

    def weight_slots(self) -> Iterator[WeightSlot]:
        """For each part each parameter: `<part>.<parameter>`."""
        for name, layout in self._layouts.items():
            offset = 0
            for index, (part, checkpoint_name) in enumerate(zip(self.parts, self.checkpoint_names, strict=True)):
                slot, size = self._slot(name, part, checkpoint_name, index if layout.is_stacked else offset)
                offset += size
                yield slot
        for name, key in self._lists.items():
            parameter = self._parameters[name]
            assert parameter is not None
            yield WeightSlot(f"{self.checkpoint_names[0]}.{key}", (-1,), self._list_loader(name), parameter.dtype)
        for piece in self.pieces or ():
            assert isinstance(piece, Linear)
            yield from piece.weight_slots()

    def _slot(self, name: str, part: Part, checkpoint_name: str, offset: int) -> tuple[WeightSlot, int]:
        """The slot of one part's tensor, and how many entries it takes of the dim that the parts share."""
        parameter = self._parameters[name]
        assert parameter is not None
        layout, full_name = self._layouts[name], f"{checkpoint_name}.{name}"
        shape = list(parameter.shape[1:] if layout.is_stacked else parameter.shape)
        cuts: list[tuple[int, Slice]] = []  # what to take of the checkpoint's tensor
        place: tuple[int, int, int] | None = None  # where it goes: dim, start, size
        size = 0
        if layout.output_dim is not None:
            rows = _entries(part.rows, shape[layout.output_dim], self.out_features, layout.output_block, full_name)
            shape[layout.output_dim], size = rows.full, rows.size
            cuts.append((layout.output_dim, rows))
            place = (layout.output_dim, offset, rows.size)
        if layout.input_dim is not None and layout.input_dim < len(shape):
            columns = _entries(self.columns, shape[layout.input_dim], self.in_features, layout.input_block, full_name)
            shape[layout.input_dim] = columns.full
            cuts.append((layout.input_dim, columns))
        load = self._part_loader(name, cuts, place, offset if layout.is_stacked else None)
        return WeightSlot(full_name, tuple(shape), load, parameter.dtype, layout.default is not None), size

    def _part_loader(
        self, name: str, cuts: list[tuple[int, Slice]], place: tuple[int, int, int] | None, index: int | None
    ) -> Callable[[torch.Tensor], None]:
        def load(tensor: torch.Tensor) -> None:
            target = self.materialize(name)
            target = target if index is None else target[index]
            for dim, cut in cuts:
                tensor = tensor.narrow(dim, cut.start, cut.size)
            copy_into(target if place is None else target.narrow(*place), tensor)

        return load

    def _list_loader(self, name: str) -> Callable[[torch.Tensor], None]:
        def load(tensor: torch.Tensor) -> None:
            self._parameters[name] = torch.nn.Parameter(tensor.to(self.device, copy=True), requires_grad=False)

        return load

    def finish_weights(self) -> None:
        """Let the method turn what was loaded into what it computes with."""
        bias = self._parameters.get("bias")
        if self.reduce is not None and self.reduce.rank and bias is not None:
            bias.zero_()  # added once, by the first rank
        self.method.finish_weights(self)
        if self.finished is not None:
            self.finished(self)

    def forward(self, x: torch.Tensor, activation: Activation | None = None) -> torch.Tensor:
        """[T, in_features] → [T, out_features], or the activation of that, in one go where the method has one."""
        if activation is not None:
            return self._activated(x, activation)
        y = self.method.apply(self, x)
        if self.adapters is not None:
            y = self.adapters.add(x, y)
        return y if self.reduce is None else self.reduce.reduce(y)

    def _activated(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        in_one_go = getattr(self.method, "apply_activated", None)
        if in_one_go is None or self.adapters is not None or self.reduce is not None:
            return activation(self.forward(x))
        y: torch.Tensor = in_one_go(self, x, activation)
        return y


def _entries(features: Slice, num_entries: int, num_features: int, block: int | None, name: str) -> Slice:
    """Which entries of a tensor's dim stand for these features, where `num_entries` stand for all `num_features`."""
    if block is None and num_features % max(num_entries, 1) == 0:
        return features.scaled(num_features // num_entries) if num_entries else Slice(0, 0, 0)
    if block is not None:
        if features.start % block:
            raise ModelError(f"tensor {name} cannot be divided among ranks: {block} features share an entry")
        return features.scaled(block)
    exact = [size * num_entries % num_features == 0 for size in features]
    if not all(exact):
        share = f"{features.size} of {num_features} features"
        raise ModelError(f"tensor {name}: {share} are no whole part of its {num_entries} entries")
    return Slice(*(size * num_entries // num_features for size in features))
