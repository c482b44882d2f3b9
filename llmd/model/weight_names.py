"""Which tensor of a checkpoint goes to which slot: names as they are spelled there, shapes and dtypes that must agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import NamedTuple

import torch
from torch import nn

from llmd.errors import ModelError
from llmd.model.layers import WeightSlot

_PLAIN_FLOATS = {"float16", "bfloat16", "float32", "float64", "float8_e8m0fnu"}  # the last holds powers of two, for scales
_WIDE_INTS = {"int32", "int64"}


class TensorInfo(NamedTuple):
    """What is known of a checkpoint's tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # "float32", "bfloat16" …
    file: str


class Slot(NamedTuple):
    """A slot and the module that is finished when all of its slots are filled."""

    slot: WeightSlot
    module: nn.Module
    num_bytes: int

    @classmethod
    def of(cls, slot: WeightSlot, module: nn.Module) -> Slot:
        """What is of any length counts as short."""
        itemsize = slot.dtype.itemsize if slot.dtype is not None else 0
        return cls(slot, module, max(0, torch.Size(slot.shape).numel()) * itemsize)


def match_names(
    module: nn.Module, slots: Mapping[str, Slot], infos: Mapping[str, TensorInfo] | None, ignored: Sequence[str]
) -> dict[str, Slot]:
    """Slots by their names in the checkpoint; every missing, extra or misshapen tensor is told at once."""
    if infos is None:
        return {name: slot for name, slot in slots.items() if not slot.slot.is_optional}
    arrange = getattr(module, "arrange_slots", None)  # a module that knows what the names of a checkpoint stand for
    if arrange is not None:
        given = {name: slot.slot for name, slot in slots.items()}
        wanted = {name: Slot.of(slot, slots[whole].module) for name, (whole, slot) in arrange(given, infos).items()}
    else:
        prefix, spellings = getattr(module, "weight_prefix", "model."), getattr(module, "weight_spellings", ())
        wanted = _spelled(slots, infos, prefix, spellings)
    wanted = {name: slot for name, slot in wanted.items() if name in infos or not slot.slot.is_optional}
    absent = [name for name in wanted if name not in infos]
    if absent:
        raise ModelError(f"the checkpoint lacks {some(absent)}")
    extra = [name for name in infos if name not in wanted and not any(fnmatch(name, pattern) for pattern in ignored)]
    if extra:
        raise ModelError(f"the checkpoint holds {some(extra)}, for which this architecture has no place")
    for name, slot in wanted.items():
        if not is_shape(infos[name].shape, slot.slot.shape):
            raise wrong_shape(name, infos[name].shape, slot.slot.shape, infos[name].file)
        if not _is_dtype(infos[name].dtype, slot.slot.dtype):
            raise _wrong_dtype(name, infos[name], str(slot.slot.dtype).removeprefix("torch."))
    return wanted


def is_shape(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Equal, both a single number however it is written, or one dim where that may be of any length, (-1,)."""
    return found == shape or (found in ((), (1,)) and shape in ((), (1,))) or (shape == (-1,) and len(found) == 1)


def _is_dtype(found: str, kept: torch.dtype | None) -> bool:
    """Whether a cast keeps the meaning: among plain floats and among wide integers; all others are codes of bits."""
    name = str(kept).removeprefix("torch.")
    return kept is None or name == found or any({name, found} <= family for family in (_PLAIN_FLOATS, _WIDE_INTS))


def _spelled(
    slots: Mapping[str, Slot], infos: Mapping[str, TensorInfo], prefix: str, spellings: Sequence[tuple[str, str]]
) -> dict[str, Slot]:
    """Slots by the names that this checkpoint uses: with the base model's prefix or saved without it, new or old words."""
    bare = {name.removeprefix(prefix): slot for name, slot in slots.items()}
    led = {name if name.startswith(prefix) else prefix + name: slot for name, slot in slots.items()}
    best = max((dict(slots), bare, led), key=lambda names: len(names.keys() & infos.keys()))
    found = {}
    for name, slot in best.items():
        older = (name.replace(new, old) for new, old in spellings if new in name and name not in infos)
        found[next((other for other in older if other in infos), name)] = slot
    return found


def wrong_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...], file: str = "") -> ModelError:
    where = f" in {file}" if file else ""
    return ModelError(f"tensor {name}{where} has shape {list(found)}, config.json asks for {list(shape)}")


def _wrong_dtype(name: str, info: TensorInfo, wanted: str) -> ModelError:
    return ModelError(
        f"tensor {name} in {info.file} is {info.dtype}, config.json asks for {wanted}: its quantization_config does not "
        "describe these weights"
    )


def some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"tensor {shown}" if len(names) == 1 else f"{len(names)} tensors: {shown}{' …' if len(names) > 4 else ''}"
