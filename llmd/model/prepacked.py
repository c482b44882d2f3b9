"""Weights as a CPU reads them, kept on disk: what quantizing and packing made of a checkpoint, for the next start.

A layer whose methods have `restore_weights` is kept: its parameters and buffers, and the facts that the methods want back.
All others come from the checkpoint, which is checked as ever. The file is a safetensors file; its metadata holds a sum of
each tensor's words, so that a file that was damaged, or never got to the disk before a machine went down, is made again.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from llmd.engine.executor import LoadProgress
from llmd.errors import ModelError
from llmd.model.layers import Embedding, Layer, Linear
from llmd.model.prepacked_files import drop, is_ours, make_room
from llmd.model.quantization import PartMethods, Unquantized
from llmd.model.weight_memory import MappedFile, WeightMemory, copy_into

log = logging.getLogger("llmd.model")

_MAX_HEADER_BYTES = 100 << 20
_WORTHWHILE_BYTES = 32 << 20  # fewer are packed in no time
_WRITE_AT_ONCE = 16 << 20
_QUIET_S = 2.0  # after loading: the first requests go before the disk
_LAST_CHANCE_S = 10.0  # for a file that is being written when the process ends
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class _Damaged(Exception):
    """What is in the file is not what was written."""


class _Entry(NamedTuple):
    """A tensor in the file; `place` is "parameter" or "buffer" and its name within the layer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    sum: int


class _Packed(NamedTuple):
    """A layer in the file."""

    tensors: dict[str, _Entry | None]  # by place; None: it is there, and holds nothing
    facts: dict[str, Any]  # by the name of the linear or table within the layer


class Prepacked:
    """One model's file. Whatever is wrong with it, or with the disk, is a line in the log and a slower start."""

    def __init__(self, path: Path, max_bytes: int, layers: Mapping[str, Layer]) -> None:
        """`layers` by their names, as they are before they are filled."""
        self._path, self._max_bytes, self._layers = path, max_bytes, layers
        self._parts = {name: _parts_of(layer) for name, layer in layers.items()}
        self._is_whole = False

    def restore(self, memory: WeightMemory, report: Callable[[LoadProgress], None]) -> set[nn.Module]:
        """Fill those layers that the file holds; which they are."""
        restored: set[nn.Module] = set()
        if not is_ours(self._path):
            return restored
        try:
            with MappedFile(self._path) as file, torch.inference_mode():
                header = _read_header(self._path)
                for name, packed in header.items():
                    restored.add(_restore(self._layers[name], packed, file, memory))
                    report(LoadProgress("prepacked weights", len(restored) / len(header)))
            os.utime(self._path)
        except (OSError, ValueError, KeyError, TypeError, ModelError, _Damaged) as error:
            log.warning("prepacked weights %s are of no use (%s): packing again", self._path.name, _said(error))
            drop([self._path])
            return restored
        self._is_whole = True
        log.info("%d layers were prepacked: %s", len(restored), self._path)
        return restored

    def save(self) -> None:
        """Write the layers, filled by now, in a thread and a little later, unless the file is there."""
        kept = {name: layer for name, layer in self._layers.items() if self._can_keep(name, layer)}
        size = sum(tensor.nbytes for layer in kept.values() for tensor in _tensors(layer))
        if self._is_whole or not kept or size < _WORTHWHILE_BYTES:
            return
        leaving = threading.Event()
        thread = threading.Thread(target=self._write, args=(kept, leaving), name="llmd-prepack", daemon=True)
        thread.start()

        def leave() -> None:
            leaving.set()
            thread.join(_LAST_CHANCE_S)

        atexit.register(leave)

    def _can_keep(self, name: str, layer: Layer) -> bool:
        """Not where nothing was packed, a method cannot take it back, or it has taken the layer apart while it packed."""
        methods = [method for _, _, method in _methods(layer) if not isinstance(method, Unquantized | PartMethods)]
        can = bool(methods) and all(hasattr(method, "restore_weights") for method in methods)
        return can and self._parts[name] == _parts_of(layer)

    def _write(self, layers: Mapping[str, Layer], leaving: threading.Event) -> None:
        torch.set_num_threads(1)  # of this thread: the others are at work
        leaving.wait(_QUIET_S)
        try:
            header, tensors = _header_of(layers)
            size = len(header) + sum(tensor.nbytes for tensor in tensors)
            why_not = make_room(self._path.parent, size, self._max_bytes)
            if why_not is None:
                _write_file(self._path, header, tensors)
                log.info("prepacked weights are kept for the next start: %s, %.1f MB", self._path, size / 1e6)
            else:
                log.info("prepacked weights are not kept: %s", why_not)
        except OSError as error:
            log.info("prepacked weights are not kept: %s", _said(error))


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


# --- layers


def _methods(layer: Layer) -> Iterator[tuple[str, Linear | Embedding, Any]]:
    """(name within the layer, linear or table, its method)"""
    for name, part in layer.named_modules():
        if isinstance(part, Linear | Embedding) and getattr(part, "method", None) is not None:
            yield name, part, part.method


def _parts_of(layer: Layer) -> list[str]:
    return [name for name, _, _ in _methods(layer)]


def _facts(layer: Layer) -> dict[str, Any]:
    """What each method wants back beside its tensors."""
    return {name: method.packed_facts(part) for name, part, method in _methods(layer) if hasattr(method, "packed_facts")}


def _places(layer: Layer) -> Iterator[tuple[str, torch.Tensor | None]]:
    for prefix, part in layer.named_modules():
        for name, parameter in part._parameters.items():
            yield f"parameter {prefix}.{name}", None if parameter is None else parameter.data
        for name, buffer in part._buffers.items():
            yield f"buffer {prefix}.{name}", buffer


def _tensors(layer: Layer) -> Iterator[torch.Tensor]:
    return (tensor for _, tensor in _places(layer) if tensor is not None)


def _restore(layer: Layer, packed: _Packed, file: MappedFile, memory: WeightMemory) -> Layer:
    """Read a layer's tensors, and only when all of them are what was written put them in their places."""
    tensors = {place: None if entry is None else _read(entry, file, memory) for place, entry in packed.tensors.items()}
    for part in layer.modules():
        for name in [name for name, parameter in part._parameters.items() if parameter is not None]:
            del part._parameters[name]
    for place, tensor in tensors.items():
        kind, _, path = place.partition(" ")
        prefix, _, name = path.rpartition(".")
        part = layer.get_submodule(prefix)
        if kind == "buffer":
            part.register_buffer(name, tensor)
        else:
            part.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
    for name, part, method in _methods(layer):
        if name in packed.facts:
            method.restore_weights(part, packed.facts[name])
    return layer


def _read(entry: _Entry, file: MappedFile, memory: WeightMemory) -> torch.Tensor:
    tensor = memory.empty(entry.shape, entry.dtype)
    copy_into(tensor, file.tensor(entry.dtype, entry.shape, entry.start))
    file.give_back(entry.start, tensor.nbytes)
    if _sum(tensor) != entry.sum:
        raise _Damaged("a sum does not agree")
    return tensor


def _sum(tensor: torch.Tensor) -> int:
    """Of all words of eight bytes, and of the bytes behind them: as fast as memory is read."""
    data = tensor.reshape(-1).view(torch.uint8)
    end = data.numel() // 8 * 8
    return int(data[:end].view(torch.int64).sum()) + int(data[end:].sum())


# --- the file


def _header_of(layers: Mapping[str, Layer]) -> tuple[bytes, list[torch.Tensor]]:
    """The first bytes of the file, and the tensors that follow them."""
    entries: dict[str, Any] = {}
    told: dict[str, Any] = {}
    tensors: list[torch.Tensor] = []
    end = 0
    for layer_name, layer in layers.items():
        sums: dict[str, int | None] = {}
        for place, tensor in _places(layer):
            sums[place] = None
            if tensor is not None:
                dense = tensor.contiguous()
                sums[place] = _sum(dense)
                offsets = [end, end + dense.nbytes]
                entries[f"{layer_name} {place}"] = {
                    "dtype": _NAMES[dense.dtype], "shape": list(dense.shape), "data_offsets": offsets,
                }  # fmt: skip
                end = offsets[1]
                tensors.append(dense)
        told[layer_name] = {"facts": _facts(layer), "sums": sums}
    text = json.dumps({"__metadata__": {"llmd": json.dumps(told)}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, tensors


def _write_file(path: Path, header: bytes, tensors: list[torch.Tensor]) -> None:
    """Beside its place, then renamed: another process never sees half a file. Not synced: there are the sums."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(header)
            for tensor in tensors:
                data = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
                for start in range(0, tensor.nbytes, _WRITE_AT_ONCE):
                    file.write(data[start : start + _WRITE_AT_ONCE])
            file.close()
            os.replace(file.name, path)
        except BaseException:
            drop([Path(file.name)])
            raise


def _read_header(path: Path) -> dict[str, _Packed]:
    """What the file holds. Raises _Damaged, KeyError, TypeError or ValueError for anything but what was written."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise _Damaged("it is cut off")
        header = json.loads(file.read(length))
    told = json.loads(header.pop("__metadata__")["llmd"])
    if 8 + length + sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()) != size:
        raise _Damaged("it is cut off")
    layers = {}
    for name, layer in told.items():
        tensors = {
            place: None if total is None else _entry(header[f"{name} {place}"], 8 + length, size, total)
            for place, total in layer["sums"].items()
        }
        layers[name] = _Packed(tensors, layer["facts"])
    return layers


def _entry(fields: Mapping[str, Any], base: int, size: int, total: int) -> _Entry:
    dtype, shape, (start, end) = _DTYPES[fields["dtype"]], tuple(fields["shape"]), fields["data_offsets"]
    if not 0 <= start <= end <= size - base or end - start != math.prod(shape) * dtype.itemsize:
        raise _Damaged("a tensor does not fit its place")
    return _Entry(dtype, shape, base + start, total)
