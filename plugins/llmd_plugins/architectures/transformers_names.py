"""Which weight of a Transformers model a checkpoint's tensor is, or is a part of: Transformers' own table of renamings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmd.api.v1 import ModelError, WeightSlot


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a checkpoint's tensor lies in a weight that Transformers makes of several."""

    expert: int | None  # along dim 0, without a dim in the checkpoint
    part: int = 0  # of so many equal ones, along `dim` of the checkpoint's tensor
    num_parts: int = 1
    dim: int = 0

    def shape_in(self, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
        """The checkpoint tensor's shape, from that of the whole. Raises ModelError for one that is not there."""
        if self.expert is not None and self.expert >= shape[0]:
            raise ModelError(f"tensor {name} is of expert {self.expert}, config.json asks for {shape[0]}")
        inner = list(shape if self.expert is None else shape[1:])
        inner[self.dim] //= self.num_parts
        return tuple(inner)

    def of(self, whole: Tensor) -> Tensor:
        """The place within the whole, a view."""
        inner = whole if self.expert is None else whole[self.expert]
        return inner.chunk(self.num_parts, self.dim)[self.part]


class CheckpointNames:
    """Made before the model's modules are changed: it asks the model's classes."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = dict(model.state_dict())
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        self.ignored = tuple(pattern for text in ignored if (pattern := _wildcards(text)) is not None)

    def arrange(
        self, slots: Mapping[str, WeightSlot], names: Iterable[str], materialize: Callable[[str], Tensor]
    ) -> dict[str, tuple[str, WeightSlot]]:
        """For each tensor of the checkpoint the slot that it fills and how; slots that nothing fills keep their names.

        `materialize(name of a slot)` is the memory of the whole weight.
        """
        found: dict[str, tuple[str, WeightSlot]] = {}
        pieces: dict[str, set[Piece]] = {}
        for name in names:
            target, source = self._rename(name)
            if target not in slots:
                continue
            slot = slots[target]
            if source is not None:
                piece = self._piece(name, source)
                pieces.setdefault(target, set()).add(piece)
                slot = _part_slot(name, slot, piece, materialize)
            found[name] = (target, slot)
        for target, given in pieces.items():
            _check_whole(slots[target], given)
        filled = {target for target, _ in found.values()}
        return {**found, **{name: (name, slot) for name, slot in slots.items() if name not in filled}}

    def _rename(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(name, self._renamings, self._converters, self._prefix, self._known)

    def _piece(self, name: str, source: str) -> Piece:
        """What a converter makes of a tensor: a stack of experts, or parts of equal size one after another."""
        converter = next(item for item in self._converters if source in item.source_patterns)
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
        part, num_parts = converter.source_patterns.index(source), len(converter.source_patterns)
        if steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            renamed = name
            for renaming in self._renamings:
                renamed, _ = renaming.rename_source_key(renamed)
            match = re.search(re.escape(source).replace(r"\*", r"(\d+)"), renamed)
            if match is not None and (len(steps) == 2 or num_parts == 1):
                return Piece(int(match[1]), part, num_parts)
        elif len(steps) == 1 and steps[0][0] == "Concatenate" and len(converter.target_patterns) == 1:
            return Piece(None, part, num_parts, steps[0][1] or 0)
        told = ", ".join(kind for kind, _ in steps)
        raise ModelError(f"tensor {name}: Transformers converts it as it loads ({told}), which llmd does not follow")


def _check_whole(slot: WeightSlot, given: set[Piece]) -> None:
    """Raises ModelError where a weight is made of tensors some of which are not there."""
    some = next(iter(given))
    experts = [None] if some.expert is None else range(slot.shape[0])
    wanted = {Piece(expert, part, some.num_parts, some.dim) for expert in experts for part in range(some.num_parts)}
    if absent := wanted - given:
        told = ", ".join(sorted({str(piece.expert) for piece in absent if piece.expert is not None})[:4])
        where = f" of experts {told}" if told else ""
        raise ModelError(f"the checkpoint lacks {len(absent)} of the {len(wanted)} tensors that make {slot.name}{where}")


def _wildcards(expression: str) -> str | None:
    """A regular expression that is searched for, as a pattern of file names; None for one that is more than that."""
    text = expression.replace(r"\.", ".").replace(".*", "*").replace(r"\d+", "*")
    if re.search(r"[][()|\\+?]", text):
        return None
    start, end = "" if text.startswith("^") else "*", "" if text.endswith("$") else "*"
    return start + text.strip("^$") + end


def _part_slot(name: str, whole: WeightSlot, piece: Piece, materialize: Callable[[str], Tensor]) -> WeightSlot:
    def load(tensor: Tensor) -> None:
        piece.of(materialize(whole.name)).copy_(tensor)

    return WeightSlot(name, piece.shape_in(whole.shape, name), load, whole.dtype)
