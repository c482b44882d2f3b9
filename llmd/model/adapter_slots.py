"""Device slots for adapters: room for `num_slots` of them beside every linear, the embedding and the head.

A slot's A and B lie stacked by layer, so that a step adds the adapters of all its rows with one kernel a layer. Which row
uses which slot is told once a step (`StepRows`); a layer whose step has no such row pays for a look at one attribute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from llmd.errors import ModelError, StepFailed
from llmd.model.adapters import BaseModule
from llmd.model.batch import zeros
from llmd.model.layers import Embedding, Linear, LMHead
from llmd.model.staging import put, send
from llmd_kernels.lora import LoraRows, LoraWeights, add_lora, add_lora_of_ids, rows_of_slots


class Place(NamedTuple):
    """Where a module of the base lies in a layer: which part, and which of its outputs and inputs this rank holds."""

    part: int
    offset: int  # among the layer's outputs
    rows: slice
    columns: slice


class PackedPart(NamedTuple):
    """One part of a layer for one adapter, in the slots' dtype."""

    a: Tensor  # [rank, in], of an embedding [entries, rank]
    b: Tensor  # [rank, out], scaled


@dataclass(slots=True, kw_only=True)
class PackedLayer:
    """What one adapter puts into a layer's slot."""

    parts: dict[int, PackedPart]
    scale: Tensor | None = None  # [out]: what DoRA makes of the base's outputs, bias aside
    bias: Tensor | None = None  # [out], added


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedAdapter:
    """An adapter ready to be copied into a slot."""

    layers: dict[str, PackedLayer]
    rank: int
    num_bytes: int


class StepRows:
    """Which slot each row of the layers' input uses in the step at hand; shared by all layers of a model."""

    def __init__(self, num_slots: int, device: torch.device, max_rows: int = 0) -> None:
        self.num_slots = num_slots
        self.device = device
        # Up to `max_rows` rows are told in the same place every time: recorded steps look there.
        self._told = torch.zeros(2 * max_rows + num_slots + 1, dtype=torch.int32, device=device)
        self._tokens, self._starts, self._slots_in_place = self._told.split([max_rows, num_slots + 1, max_rows])
        self.rows: LoraRows | None = None  # None: no row uses any
        self._num_rows = 0
        self._slots: np.ndarray | None = None
        self._of_all: int | None = None

    def use(self, slots: np.ndarray, num_places: int = 0, *, by_all: bool = False) -> None:
        """Row i of what comes uses slots[i]; negative: none. With `num_places` there are as many rows, the others use none;
        `by_all`: layers are to do their work although no row wants it."""
        self._of_all = self._slots = self.rows = None
        self._num_rows = max(len(slots), num_places)
        if by_all or (slots >= 0).any():
            self._slots = np.full(self._num_rows, -1, np.int64)
            self._slots[: len(slots)] = slots
            self.rows = self._grouped(self._slots)

    def _grouped(self, slots: np.ndarray) -> LoraRows:
        if self.device.type != "cpu":
            return self._sent(slots)
        rows = rows_of_slots(torch.from_numpy(slots), self.num_slots, self.device)
        if len(slots) > len(self._tokens):
            return rows
        self._tokens[: len(rows.tokens)].copy_(rows.tokens)
        return LoraRows(self._tokens[: len(slots)], self._starts.copy_(rows.starts), rows.spans)

    def _sent(self, slots: np.ndarray) -> LoraRows:
        """The same for a GPU: one copy, which waits for nothing."""
        rows = rows_of_slots(torch.from_numpy(slots), self.num_slots, torch.device("cpu"))
        if len(slots) > len(self._tokens):
            return LoraRows(send(rows.tokens.numpy(), self.device), send(rows.starts.numpy(), self.device), rows.spans)
        told = np.zeros(len(self._told), np.int32)
        told[: len(rows.tokens)], told[len(self._tokens) :][: self.num_slots + 1] = rows.tokens, rows.starts
        told[-len(self._tokens) :][: len(slots)] = slots + 1
        put(self._told, told)
        return LoraRows(self._tokens[: len(slots)], self._starts, rows.spans)

    def use_one(self, slot: int) -> None:
        """All rows of what comes, however many, use one slot."""
        self._of_all = slot if slot >= 0 else None
        self.rows = self._grouped(np.asarray([slot])) if slot >= 0 else None

    def of(self, num_rows: int) -> LoraRows:
        """The rows of an input of `num_rows`."""
        if self._of_all is not None:
            self._slots = np.full(num_rows, self._of_all, np.int64)
            return self._grouped(self._slots)
        assert self.rows is not None
        if num_rows != self._num_rows:
            raise StepFailed(f"a layer with adapters has {num_rows} rows, the step told of {self._num_rows}")
        return self.rows

    def slots(self) -> Tensor:
        """[T] int64, each row's slot plus one; 0: none."""
        assert self._slots is not None
        if self.device.type != "cpu" and len(self._slots) <= len(self._slots_in_place):
            return self._slots_in_place[: len(self._slots)].long()
        return send(self._slots + 1, self.device)


class LayerSlots:
    """The slots of one layer. Memory is taken when the layer is made, on a CPU when a slot is first filled."""

    def __init__(self, layer: Linear | Embedding | LMHead, part_sizes: Sequence[int], max_rank: int, step: StepRows) -> None:
        self.layer = layer
        self.step = step
        self.in_features, self.out_features = _shape_of(layer)
        self.dtype = layer.dtype
        self.is_embedding = isinstance(layer, Embedding)
        num_slots, num_parts, device = step.num_slots, len(part_sizes), layer.device
        inner = (self.in_features, max_rank) if self.is_embedding else (max_rank, self.in_features)
        self.weights = LoraWeights(
            a=zeros((num_slots, num_parts, *inner), self.dtype, device),
            b=zeros((num_slots, max_rank, self.out_features), self.dtype, device),
            ranks=torch.zeros(num_slots, num_parts, dtype=torch.int32, device=device),
            part_starts=tuple(np.cumsum([0, *part_sizes]).tolist()),
        )
        self._filled: set[int] = set()  # slots whose adapter changes this layer
        self._scale: Tensor | None = None  # [slots + 1, out], the first of ones
        self._bias: Tensor | None = None  # [slots + 1, out], the first of zeros

    @property
    def num_bytes(self) -> int:
        """What the stacks take when every slot is full."""
        return self.weights.a.nbytes + self.weights.b.nbytes

    def fill(self, slot: int, packed: PackedLayer | None) -> None:
        """Put an adapter's share into a slot, or nothing.

        On a GPU a layer that was filled once goes on doing its work, for ranks of 0: recorded steps stay what they are.
        """
        if self.layer.device.type == "cpu":
            self._filled.discard(slot)
        ranks = [0] * self.weights.ranks.shape[1]
        if packed is not None:
            self._filled.add(slot)
            for part, (a, b) in packed.parts.items():
                ranks[part] = rank = b.shape[0]
                low, high = self.weights.part_starts[part : part + 2]
                target = self.weights.a[slot, part]
                (target[:, :rank] if self.is_embedding else target[:rank]).copy_(a, non_blocking=True)
                self.weights.b[slot, :rank, low:high].copy_(b, non_blocking=True)
        put(self.weights.ranks[slot], np.asarray(ranks, np.int32))
        self._scale = self._fill_vector(self._scale, slot, packed.scale if packed else None, 1.0)
        self._bias = self._fill_vector(self._bias, slot, packed.bias if packed else None, 0.0)

    @property
    def layout(self) -> int:
        """Grows whenever `add` comes to do other work than before, on a GPU."""
        return bool(self._filled) + (self._scale is not None) + (self._bias is not None)

    @property
    def can_record(self) -> bool:
        """Whether the work of `add` is the same whichever rows use which slot."""
        return not (self.is_embedding and self._filled)

    def _fill_vector(self, table: Tensor | None, slot: int, vector: Tensor | None, neutral: float) -> Tensor | None:
        if table is None and vector is not None:
            shape = (self.step.num_slots + 1, self.out_features)
            table = torch.full(shape, neutral, dtype=torch.float32, device=self.layer.device)
        if table is not None:
            table[slot + 1] = neutral if vector is None else vector.to(table.device)
        return table

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y of the base [T, out] with what the adapters of the step's rows make of x; y may be overwritten."""
        if self.step.rows is None or not self._filled:
            return y
        rows = self.step.of(y.shape[0])
        if self._scale is not None:
            y = self._scaled(y, self._scale)
        y = add_lora_of_ids(y, x, self.weights, rows) if self.is_embedding else add_lora(y, x, self.weights, rows)
        return y if self._bias is None else y + self._bias[self.step.slots()].to(y.dtype)

    def _scaled(self, y: Tensor, scale: Tensor) -> Tensor:
        bias = self.layer._parameters.get("bias")
        plain = y.float() if bias is None else y.float() - bias.float()
        plain *= scale[self.step.slots()]
        return (plain if bias is None else plain + bias.float()).to(y.dtype)


class AdapterTable:
    """All slots of one model, the adapters kept for them in host memory, and who uses which. The executor thread's own."""

    def __init__(
        self, module: nn.Module, *, num_slots: int, max_rank: int, max_rows: int, targets: Sequence[str] = ()
    ) -> None:
        self.max_rank, self.num_slots = max_rank, num_slots
        self.layers: dict[str, LayerSlots] = {}
        self.modules: dict[str, BaseModule] = {}
        self.places: dict[str, list[tuple[str, Place]]] = {}  # module of the checkpoint → its layer and place there
        chosen = [(name, layer) for name, layer in module.named_modules() if _is_offered(name, layer, targets)]
        if not chosen:
            raise ModelError(f"lora_target_modules: this model has no modules for adapters named {', '.join(targets)}")
        self.step = StepRows(num_slots, chosen[0][1].device, max_rows)
        for name, layer in chosen:
            self._add_layer(name, layer, targets)
        self._host: dict[int, PackedAdapter] = {}
        self._num_fills = 0
        self._row_slots = np.full(max_rows, -1, dtype=np.int32)

    def _add_layer(self, name: str, layer: Linear | Embedding | LMHead, targets: Sequence[str]) -> None:
        self.modules.update((part, base) for part, base in modules_of(name, layer) if _is_target(part, targets))
        sizes = [part.rows.size for part in layer.parts] if isinstance(layer, Linear) else [_shape_of(layer)[1]]
        layer.adapters = self.layers[name] = LayerSlots(layer, sizes, self.max_rank, self.step)
        for part, places in _places_of(name, layer):
            if part in self.modules:
                self.places[part] = [(name, place) for place in places]

    @property
    def num_bytes(self) -> int:
        """What all slots take."""
        return sum(layer.num_bytes for layer in self.layers.values())

    # --- adapters come and go

    def keep(self, adapter_id: int, packed: PackedAdapter) -> None:
        """Hold an adapter in host memory under its id."""
        self._host[adapter_id] = packed

    def drop(self, adapter_id: int) -> None:
        """Let go of the host's copy; a slot that holds the adapter keeps it."""
        self._host.pop(adapter_id, None)

    def fill(self, slot: int, adapter_id: int) -> None:
        """Copy an adapter into a slot, behind the steps that are queued on the device."""
        packed = self._host.get(adapter_id)
        if packed is None or not 0 <= slot < self.num_slots:
            raise StepFailed(f"adapter {adapter_id} cannot be put into slot {slot}: it is not loaded")
        self._num_fills += 1
        for name, layer in self.layers.items():
            layer.fill(slot, packed.layers.get(name))

    # --- rows

    def variant(self, rows: Sequence[int]) -> int | None:
        """0 where none of these rows uses an adapter; else a number that changes with what layers do; None: see
        `can_record`."""
        if (self._row_slots[np.asarray(rows, dtype=np.int64)] < 0).all():
            return 0
        return self._num_fills if self.step.device.type == "cpu" else self.present_variant or None

    @property
    def present_variant(self) -> int:
        """What `variant` would tell of a row that uses an adapter; 0 where that cannot be recorded or nothing is filled."""
        layers = self.layers.values()
        if self.step.device.type == "cpu" or not all(layer.can_record for layer in layers):
            return 0
        return 1 + sum(layer.layout for layer in layers) if self._num_fills else 0

    def admit(self, row: int, slot: int | None) -> None:
        """The sequence in this row uses a slot, or none."""
        self._row_slots[row] = -1 if slot is None else slot

    def use_tokens(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """The layers' next input: so many tokens of each row, one after another."""
        slots = self._row_slots[np.asarray(rows)]
        self.step.use(slots if len(rows) == sum(counts) else np.repeat(slots, counts))

    def use_rows(self, rows: Sequence[int], num_places: int = 0, *, by_all: bool = False) -> None:
        """The next input has one line for each of these rows; see `StepRows.use`."""
        self.step.use(self._row_slots[np.asarray(rows, dtype=np.int64)], num_places, by_all=by_all)

    def use_one(self, row: int) -> None:
        """All lines of the next input are of this row."""
        self.step.use_one(int(self._row_slots[row]))


class NoAdapters:
    """Stands for the table where adapters are not served: rows have none."""

    num_slots = num_bytes = present_variant = 0

    def variant(self, rows: Sequence[int]) -> int | None:
        """All are of the base model."""
        return 0

    def keep(self, adapter_id: int, packed: PackedAdapter) -> None:
        """There is no place for it."""

    def drop(self, adapter_id: int) -> None:
        """There is none."""

    def fill(self, slot: int, adapter_id: int) -> None:
        """A plan that asks for it is wrong."""
        raise StepFailed(f"adapter {adapter_id} cannot be put into slot {slot}: adapters are not served")

    def admit(self, row: int, slot: int | None) -> None:
        """Every row is of the base model."""

    def use_tokens(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Nothing to tell the layers."""

    def use_rows(self, rows: Sequence[int], num_places: int = 0, *, by_all: bool = False) -> None:
        """Nothing to tell the layers."""

    def use_one(self, row: int) -> None:
        """Nothing to tell the layers."""


def _shape_of(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of this rank."""
    if isinstance(layer, Linear):
        return layer.in_features, layer.out_features
    entries, size = layer.shape
    return (entries, size) if isinstance(layer, Embedding) else (size, entries)


def takes_adapters(layer: nn.Module) -> bool:
    """Whether a layer is what adapters are made for: a linear, the table of tokens, the head."""
    if isinstance(layer, Linear):
        return not (layer.is_piece or layer.is_routed)
    return isinstance(layer, LMHead) or (isinstance(layer, Embedding) and layer.holds_tokens)


def _is_offered(name: str, layer: nn.Module, targets: Sequence[str]) -> bool:
    return takes_adapters(layer) and any(_is_target(part, targets) for part, _ in modules_of(name, layer))


def _is_target(name: str, targets: Sequence[str]) -> bool:
    return not targets or any(name == target or name.endswith(f".{target}") for target in targets)


def modules_of(name: str, layer: Any) -> Iterator[tuple[str, BaseModule]]:
    """The checkpoint's modules that a layer stands for; a merged one may also be named as a whole."""
    if not isinstance(layer, Linear):
        sizes = _shape_of(layer)
        yield name, BaseModule("embedding" if isinstance(layer, Embedding) else "head", sizes[0], sizes[1])
        return
    whole = name if len(layer.parts) > 1 else ""
    for part, module in zip(layer.parts, layer.checkpoint_names, strict=True):
        yield module, BaseModule("linear", layer.columns.full, part.rows.full, whole)
    if whole:
        yield whole, BaseModule("merged", layer.columns.full, sum(part.rows.full for part in layer.parts))


def _places_of(name: str, layer: Any) -> Iterator[tuple[str, list[Place]]]:
    """For each module the places of its outputs; a merged module's one after another."""
    everything = slice(None)
    if not isinstance(layer, Linear):
        yield name, [Place(0, 0, everything, everything)]
        return
    columns = slice(layer.columns.start, layer.columns.start + layer.columns.size)
    whole: list[Place] = []
    offset = before = 0
    for index, (part, module) in enumerate(zip(layer.parts, layer.checkpoint_names, strict=True)):
        start, size = part.rows.start, part.rows.size
        yield module, [Place(index, offset, slice(start, start + size), columns)]
        whole.append(Place(index, offset, slice(before + start, before + start + size), columns))
        offset, before = offset + size, before + part.rows.full
    if len(layer.parts) > 1:
        yield name, whole
