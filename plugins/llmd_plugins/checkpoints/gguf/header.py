"""The head of a GGUF file: metadata and where each tensor lies, checked against the file's size before anything is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmd.api.v1 import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ENTRIES = 1 << 17  # metadata keys, tensors
_MAX_ITEMS = 1 << 24  # of an array
_MAX_DIMS = 4
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class BlockType(NamedTuple):
    """A tensor type: so many weights lie in so many bytes."""

    name: str
    num_weights: int
    num_bytes: int


TYPES = {
    0: BlockType("F32", 1, 4), 1: BlockType("F16", 1, 2), 30: BlockType("BF16", 1, 2), 2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20), 6: BlockType("Q5_0", 32, 22), 7: BlockType("Q5_1", 32, 24), 8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144), 13: BlockType("Q5_K", 256, 176), 14: BlockType("Q6_K", 256, 210),
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
_OTHER_TYPES = {
    10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4",
}  # fmt: skip


class TensorEntry(NamedTuple):
    """Where a tensor lies; `shape` as torch has it, the last dim contiguous."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    file: Path


class GgufHeader(NamedTuple):
    """Metadata of the first file, tensors of all."""

    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


def read_gguf(path: Path) -> GgufHeader:
    """Read a file, or all parts of a split one. Raises ModelError naming the file and what is wrong."""
    files = _parts(path)
    metadata, tensors = _read_one(files[0])
    for file in files[1:]:
        tensors |= _read_one(file)[1]
    return GgufHeader(files, metadata, tensors)


def _parts(path: Path) -> tuple[Path, ...]:
    match = _SPLIT.search(path.name)
    if match is None:
        return (path,)
    count, stem = int(match[2]), path.name[: match.start()]
    files = tuple(path.with_name(f"{stem}-{index + 1:05d}-of-{count:05d}.gguf") for index in range(count))
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file.name} is missing: {path.name} is one of {count} parts")
    return files


def _read_one(path: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).read()
    except (OSError, ValueError) as error:  # of an empty file, or one that may not be read
        raise ModelError(f"{path.name} cannot be read: {error}") from None
    except (struct.error, UnicodeDecodeError):
        raise ModelError(f"{path.name} is truncated or garbled: its header ends within an entry") from None


class _Reader:
    """Goes through the head of one file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        if self._data[:4] != _MAGIC:
            raise ModelError(f"{self._path.name} is no GGUF file")
        self._at = 4
        version = self._number("I")
        if version not in _VERSIONS:
            raise ModelError(f"{self._path.name} is GGUF version {version}; versions 2 and 3, little-endian, are read")
        num_tensors, num_keys = self._count(_MAX_ENTRIES, "tensors"), self._count(_MAX_ENTRIES, "metadata keys")
        metadata = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        raw = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20:
            raise ModelError(f"{self._path.name}: general.alignment must be from 8 to 1048576, got {alignment!r}")
        base = -(-self._at // alignment) * alignment
        return metadata, {name: self._entry(base, name, shape, kind, offset) for name, shape, kind, offset in raw}

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _count(self, most: int, what: str) -> int:
        count: int = self._number("Q")
        if count > most:
            raise ModelError(f"{self._path.name} is garbled: {count} {what}; at most {most} are read")
        return count

    def _string(self) -> str:
        size = self._number("Q")
        if size > len(self._data) - self._at:
            raise ModelError(f"{self._path.name} is truncated or garbled: a string of {size} bytes at byte {self._at}")
        self._at += size
        return self._data[self._at - size : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._number("I"), self._count(_MAX_ITEMS, "items of an array")
            if inner == _STRING:
                return [self._string() for _ in range(count)]
            if inner in _NUMBERS:
                layout = f"<{count}{_NUMBERS[inner]}"
                values = list(struct.unpack_from(layout, self._data, self._at))
                self._at += struct.calcsize(layout)
                return values
            raise ModelError(f"{self._path.name} is garbled: an array of type {inner}")
        if kind not in _NUMBERS:
            raise ModelError(f"{self._path.name} is garbled: metadata of type {kind}")
        return self._number(_NUMBERS[kind])

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type, offset."""
        name, num_dims = self._string(), self._number("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ModelError(f"{self._path.name}: tensor {name} has {num_dims} dimensions; 1 to {_MAX_DIMS} are read")
        dims = struct.unpack_from(f"<{num_dims}Q", self._data, self._at)
        self._at += 8 * num_dims
        return name, tuple(reversed(dims)), self._number("I"), self._number("Q")

    def _entry(self, base: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorEntry:
        where = f"{self._path.name}: tensor {name}"
        if kind not in TYPES:
            known = ", ".join(found.name for found in TYPES.values())
            raise ModelError(f"{where} is of type {_OTHER_TYPES.get(kind, kind)}; types that are read: {known}")
        block = TYPES[kind]
        if shape[-1] % block.num_weights:
            raise ModelError(f"{where}: rows of {shape[-1]} are no whole blocks of {block.num_weights} ({block.name})")
        num_bytes = math.prod(shape) // block.num_weights * block.num_bytes
        if base + offset + num_bytes > len(self._data):
            raise ModelError(f"{self._path.name} is truncated: {len(self._data)} bytes, tensor {name} is cut off")
        return TensorEntry(name, block, shape, base + offset, num_bytes, self._path)
