"""An adapter merged into the base's weights as they load: one model, no slots, nothing to add in a step.

Each tensor of the checkpoint that the adapter changes is changed before its layer takes it, so whatever the layer makes of
it (a slice, a cast, 8 bits) is made of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmd.errors import AdapterError, ModelError
from llmd.model.adapter_slots import modules_of, takes_adapters
from llmd.model.adapters import BaseModule, LowRank, read_adapter
from llmd.model.layers import Embedding, Linear, LMHead, WeightSlot

_MAX_RANK = 4096

Change = Callable[[Tensor], Tensor]


def merge(
    module: nn.Module, slots: Mapping[str, WeightSlot], folder: Path, formats: Mapping[str, Any]
) -> dict[str, WeightSlot]:
    """The slots of a model, those that an adapter changes with the change. Raises ModelError."""
    modules: dict[str, BaseModule] = {}
    parts: dict[str, list[Part]] = {}
    for name, layer in module.named_modules():
        if takes_adapters(layer):
            assert isinstance(layer, Linear | Embedding | LMHead)
            modules.update(modules_of(name, layer))
            parts |= _parts_of(name, layer)
    try:
        adapter = read_adapter(folder, formats, modules, _MAX_RANK)
    except AdapterError as error:
        raise ModelError(f"merge_adapter: {error}") from None
    _refuse_tables(adapter.modules, module)
    changed = dict(slots)  # of several changes to one tensor the last is made first
    for name, low_rank in adapter.modules.items():
        for part in parts[name]:
            _change(
                changed, f"{part.name}.weight", _sum_with(low_rank, part.rows, is_table=modules[name].kind == "embedding")
            )
            if low_rank.b_bias is not None:
                _change(changed, f"{part.name}.bias", _plus(_bias_of(name, low_rank)[part.rows]))
    for name, bias in adapter.biases.items():
        _change(changed, f"{name}.bias", _in_place_of(bias))
    for name, table in adapter.copies.items():
        _change(changed, f"{name}.weight", _only(name, table))
    return changed


class Part(NamedTuple):
    """A module of the checkpoint, and its rows in what the adapter calls a module."""

    name: str
    rows: slice


def _parts_of(name: str, layer: Linear | Embedding | LMHead) -> dict[str, list[Part]]:
    """The checkpoint's modules that each name for a layer, or a part of it, stands for."""
    if not isinstance(layer, Linear):
        return {name: [Part(name, slice(None))]}
    found = {part: [Part(part, slice(None))] for part in layer.checkpoint_names}
    if len(layer.parts) > 1:
        ends = list(accumulate((part.rows.full for part in layer.parts), initial=0))
        rows = [slice(start, end) for start, end in pairwise(ends)]
        found[name] = [Part(part, some) for part, some in zip(layer.checkpoint_names, rows, strict=True)]
    return found


def _bias_of(name: str, low_rank: LowRank) -> Tensor:
    assert low_rank.b_bias is not None
    if low_rank.magnitude is not None:
        raise ModelError(f"merge_adapter: {name} has lora_bias and use_dora: serve the adapter with enable_lora")
    return low_rank.b_bias.float() * low_rank.scaling


def _only(name: str, table: Tensor) -> Change:
    def check(weight: Tensor) -> Tensor:
        if weight.shape != table.shape or not torch.equal(table.to(weight.dtype), weight):
            raise ModelError(f"merge_adapter: tensor {name}.weight replaces the base's whole weight (modules_to_save)")
        return weight

    return check


def _change(slots: dict[str, WeightSlot], name: str, change: Change) -> None:
    slot = slots.get(name)
    if slot is None:
        raise ModelError(f"merge_adapter: the base has no tensor {name} of its own that the adapter could be merged into")
    load = slot.load
    slots[name] = slot._replace(load=lambda tensor: load(change(tensor)))


def _in_place_of(values: Tensor) -> Change:
    return lambda tensor: values.to(tensor.dtype)


def _plus(values: Tensor) -> Change:
    return lambda tensor: (tensor.float() + values).to(tensor.dtype)


def _sum_with(low_rank: LowRank, rows: slice, *, is_table: bool) -> Change:
    """W + s·B·A, each row brought to its magnitude where there is one."""

    def change(weight: Tensor) -> Tensor:
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(f"merge_adapter: the checkpoint's weights are {weight.dtype}, not 16 or 32 bits wide")
        wide = weight.float().T if is_table else weight.float()
        wide = torch.addmm(wide, low_rank.b[rows].float(), low_rank.a.float(), alpha=low_rank.scaling)
        if low_rank.magnitude is not None:
            wide *= (low_rank.magnitude[rows].float() / torch.linalg.vector_norm(wide, dim=1)).unsqueeze(1)
        return (wide.T if is_table else wide).to(weight.dtype)

    return change


def _refuse_tables(changed: Mapping[str, LowRank], module: nn.Module) -> None:
    """One table for embedding and head cannot be two."""
    heads = [name for name, layer in module.named_modules() if isinstance(layer, LMHead) and layer.is_tied]
    tables = [name for name, layer in module.named_modules() if isinstance(layer, Embedding) and name in changed]
    if heads and tables:
        raise ModelError(f"merge_adapter: {tables[0]} shares its table with {heads[0]}: serve the adapter with enable_lora")
