"""Reads safetensors by mapping the files: a tensor is a view of the mapping until it is copied to its place.

The pages of a tensor are given back as soon as it was copied, so that the mapping adds one tensor to the process, not a
whole shard. The header is checked against the file's size before anything is touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmd.api.v1 import MappedFile, ModelError, TensorInfo, TensorPlace, WeightSlot
from llmd_plugins.checkpoints.safetensors import INDEX

_MAX_HEADER_BYTES = 100 << 20
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


class _Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class SafetensorsCheckpoint:
    """All tensors of a folder's safetensors files."""

    def __init__(self, folder: Path) -> None:
        self._files = {path: _read_header(path) for path in _find_files(folder)}
        self._infos = {
            name: TensorInfo(entry.shape, str(entry.dtype).removeprefix("torch."), path.name)
            for path, entries in self._files.items()
            for name, entry in entries.items()
        }

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def tensors(self, wanted: Mapping[str, WeightSlot]) -> Iterator[tuple[str, torch.Tensor, str]]:
        for index, (path, entries) in enumerate(self._files.items()):
            phase = self._phase(index)
            mine = sorted((entry.start, name) for name, entry in entries.items() if name in wanted)
            if mine:
                yield from ((name, tensor, phase) for name, tensor in _read(path, entries, [name for _, name in mine]))

    def places(self, wanted: Mapping[str, WeightSlot]) -> list[TensorPlace]:
        return [
            TensorPlace(name, path, entry.start, entry.dtype, entry.shape, self._phase(index))
            for index, (path, entries) in enumerate(self._files.items())
            for name, entry in sorted(entries.items(), key=lambda item: item[1].start)
            if name in wanted
        ]

    def close(self) -> None:
        self._files = {}

    def _phase(self, index: int) -> str:
        return f"shard {index + 1}/{len(self._files)}" if len(self._files) > 1 else "weights"


def _find_files(folder: Path) -> list[Path]:
    """The index's shards, or the one file, or every file but Mistral's consolidated duplicates."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).is_file():
        return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{INDEX} cannot be read: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{INDEX} names a file outside the model's folder: {name!r}")
        if not (folder / name).is_file():
            raise ModelError(f"{name} is missing: {INDEX} names it")
    return [folder / name for name in sorted(names)]


def _read_header(path: Path) -> dict[str, _Entry]:
    """The header's entries, checked: a truncated or garbled file never gets further."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{path.name} is no safetensors file, or truncated: {size} bytes, header of {length}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError:
        raise ModelError(f"{path.name}: the header is no JSON") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path.name}: the header is no object")
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items() if name != "__metadata__"}
    end = max((entry.start + entry.size for entry in entries.values()), default=8 + length)
    if end > size:
        cut = next(name for name, entry in entries.items() if entry.start + entry.size > size)
        raise ModelError(f"{path.name} is truncated: {size} bytes of {end}, tensor {cut} is cut off")
    return entries


def _entry(path: Path, name: str, fields: Any, base: int) -> _Entry:
    try:
        dtype, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        numbers = (*shape, start, end)
    except (TypeError, KeyError, ValueError):
        raise ModelError(f"{path.name}: the header's entry for tensor {name} is garbled") from None
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise ModelError(f"{path.name}: the header's entry for tensor {name} is garbled")
    if dtype not in _DTYPES:
        raise ModelError(f"{path.name}: tensor {name} has dtype {dtype!r}; known are {', '.join(_DTYPES)}")
    if end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ModelError(f"{path.name}: tensor {name} of shape {list(shape)} does not have {end - start} bytes")
    return _Entry(_DTYPES[dtype], shape, base + start, end - start)


def _read(path: Path, entries: Mapping[str, _Entry], names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    with MappedFile(path) as file:
        tensor: torch.Tensor | None = None
        for name in names:
            entry = entries[name]
            tensor = file.tensor(entry.dtype, entry.shape, entry.start)
            yield name, tensor
            tensor = None  # the mapping cannot be closed, nor its pages given back, while a view of it lives
            file.give_back(entry.start, entry.size)
