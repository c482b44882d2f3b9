"""The tensors of a GGUF file: quantized linears as the codes, scales and offsets of their blocks, all others dense."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmd.api.v1 import Linear, ModelError, PartMethods, QuantMethod, WeightSlot
from llmd_kernels.grouped_linear import GroupedWeight, grouped_linear, pack, unpack
from llmd_plugins.checkpoints.gguf.blocks import KINDS, dequantize
from llmd_plugins.checkpoints.gguf.config import Metadata, hugging_face_name
from llmd_plugins.checkpoints.gguf.folder import find_file
from llmd_plugins.checkpoints.gguf.header import TensorEntry, read_gguf

_CODES, _SCALES, _OFFSETS = "gguf_codes", "gguf_scales", "gguf_offsets"
_BLOCKS_AT_ONCE = 1 << 14
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufCheckpoint:
    """A GGUF file, or its parts, under the names of a Hugging Face checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._header = read_gguf(find_file(str(folder)))
        names = {entry: hugging_face_name(name) for name, entry in self._header.tensors.items()}
        self._entries = {name: entry for entry, name in names.items() if name is not None}
        self._num_heads = _permuted_heads(self._header.metadata)

    def infos(self) -> None:
        """A quantized tensor can be had in two ways, so `tensors` looks by itself whether all is there."""
        return

    def tensors(self, wanted: Mapping[str, WeightSlot]) -> Iterator[tuple[str, Tensor, str]]:
        asked = self._match(wanted)
        for index, path in enumerate(self._header.files):
            phase = f"part {index + 1}/{len(self._header.files)}" if len(self._header.files) > 1 else "weights"
            mine = sorted((entry.start, name, entry) for name, entry in self._entries.items() if entry.file == path)
            with ExitStack() as stack:
                mapping = _map(stack, path)
                for _, name, entry in mine:
                    if name in asked:
                        for slot_name, tensor in self._read(mapping, name, entry, asked[name]):
                            yield slot_name, tensor, phase
                            del tensor
                        _give_back(mapping, entry)

    def close(self) -> None:
        self._entries = {}

    def _match(self, wanted: Mapping[str, WeightSlot]) -> dict[str, dict[str, WeightSlot]]:
        """Tensor → what is wanted of it. Raises ModelError for what is missing, left over or misshapen."""
        asked: dict[str, dict[str, WeightSlot]] = {}
        for name, slot in wanted.items():
            module, _, kind = name.rpartition(".")
            tensor = f"{module}.{kind if kind == 'bias' else 'weight'}"
            tensor = tensor if tensor in self._entries else f"model.{tensor}"
            if tensor not in self._entries:
                raise ModelError(f"the GGUF file lacks tensor {name}")
            asked.setdefault(tensor, {})[name] = slot
            found = self._entries[tensor].shape
            if slot.shape != found and kind not in (_SCALES, _OFFSETS):
                raise ModelError(
                    f"tensor {name} of the GGUF file has shape {list(found)}, its metadata asks for {list(slot.shape)}"
                )
        left = [name for name in self._entries if name not in asked and not name.startswith("lm_head.")]
        if left:
            raise ModelError(f"the GGUF file holds tensor {left[0]}, for which this architecture has no place")
        return asked

    def _read(
        self, mapping: mmap.mmap, name: str, entry: TensorEntry, wanted: Mapping[str, WeightSlot]
    ) -> Iterator[tuple[str, Tensor]]:
        order = self._order(name, entry)
        if entry.type.name in _FLOATS:
            dtype = _FLOATS[entry.type.name]
            flat = torch.frombuffer(mapping, dtype=dtype, count=math.prod(entry.shape), offset=entry.start)
            dense = flat.view(entry.shape)
            yield next(iter(wanted)), dense if order is None else dense[order]
            return
        raw = torch.frombuffer(mapping, dtype=torch.uint8, count=entry.num_bytes, offset=entry.start)
        blocks = raw.view(-1, entry.type.num_bytes)
        if len(wanted) == 1:
            ((slot_name, slot),) = wanted.items()
            dense = _dense(entry, blocks, getattr(slot, "dtype", None) or torch.float32)
            yield slot_name, dense if order is None else dense[order]
            return
        stored = _split(entry, blocks)
        for slot_name in wanted:
            tensor = stored[slot_name.rpartition(".")[2]]
            yield slot_name, tensor if order is None else tensor[order]

    def _order(self, name: str, entry: TensorEntry) -> Tensor | None:
        """Rows of q and k as Hugging Face has them: the converter for llama puts both halves of a head by turns."""
        heads = next((count for part, count in self._num_heads.items() if f".{part}." in name), None)
        if heads is None:
            return None
        if heads <= 0 or entry.shape[0] % (2 * heads):
            raise ModelError(f"tensor {entry.name} of the GGUF file has {entry.shape[0]} rows, no whole heads of {heads}")
        return torch.arange(entry.shape[0]).view(heads, -1, 2).transpose(1, 2).flatten()


def _permuted_heads(raw: Mapping[str, Any]) -> dict[str, int]:
    metadata = Metadata(raw)
    if metadata.arch != "llama":
        return {}
    heads = metadata.integer("attention.head_count")
    return {"q_proj": heads, "k_proj": metadata.integer("attention.head_count_kv", heads)}


def _map(stack: ExitStack, path: Path) -> mmap.mmap:
    file = stack.enter_context(path.open("rb"))
    return stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _give_back(mapping: mmap.mmap, entry: TensorEntry) -> None:
    """Drop the whole pages of a tensor that was copied."""
    start = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (entry.start + entry.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0 and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED, start, size)


def _dense(entry: TensorEntry, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    kind = KINDS[entry.type.name]
    dense = torch.empty(len(blocks), entry.type.num_weights, dtype=dtype)
    for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
        part = slice(start, start + _BLOCKS_AT_ONCE)
        dense[part] = dequantize(kind, *kind.split(blocks[part]))
    return dense.view(entry.shape)


def _split(entry: TensorEntry, blocks: Tensor) -> dict[str, Tensor]:
    """Codes [N, K] and scales, maybe offsets, [N, K / group_size]. Raises ModelError for scales that are no numbers."""
    kind = KINDS[entry.type.name]
    codes = torch.empty(len(blocks), entry.type.num_weights, dtype=torch.uint8)
    scale = torch.empty(len(blocks), entry.type.num_weights // kind.group_size)
    offset = torch.empty_like(scale) if kind.has_offset else None
    for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
        part = slice(start, start + _BLOCKS_AT_ONCE)
        codes[part], scale[part], some = kind.split(blocks[part])
        if offset is not None and some is not None:
            offset[part] = some
    rows = entry.shape[0]
    found = {_CODES: codes.view(rows, -1), _SCALES: scale.view(rows, -1)}
    if offset is not None:
        found[_OFFSETS] = offset.view(rows, -1)
    if not all(bool(tensor.isfinite().all()) for name, tensor in found.items() if name != _CODES):
        raise ModelError(f"tensor {entry.name} of the GGUF file holds a scale that is no finite number")
    return found


class Gguf:
    """Linears stay as they are in the file."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        types = settings.get("types")
        self._types: Mapping[str, Any] = types if isinstance(types, Mapping) else {}
        for module, kind in self._types.items():
            if kind not in KINDS:
                raise ModelError(f"quantization_config.types.{module} must be one of {', '.join(KINDS)}, got {kind!r}")

    def detect(self, settings: Mapping[str, Any]) -> bool:
        return settings.get("quant_method") == "gguf"

    def method(self, layer: Linear) -> QuantMethod | None:
        names = [name if name in self._types else f"model.{name}" for name in layer.checkpoint_names]
        kinds = [self._types.get(name) for name in names]
        if len(set(kinds)) == 1:
            return GgufLinear(kinds[0]) if kinds[0] else None
        return PartMethods([GgufLinear(kind) if kind else None for kind in kinds])

    def head_method(self, layer: Linear) -> QuantMethod | None:
        return self.method(layer)


class _Loaded(NamedTuple):
    codes: Tensor
    scale: Tensor
    offset: Tensor | None


class GgufLinear:
    """Blocks of one type, as the grouped kernel reads them."""

    def __init__(self, type_name: str) -> None:
        self._kind = KINDS[type_name]

    def create_weights(self, layer: Linear) -> None:
        rows, columns, group = layer.out_features, layer.in_features, self._kind.group_size
        layer.add_weight(_CODES, (rows, columns), torch.uint8)
        layer.add_weight(_SCALES, (rows, columns // group), torch.float32, input_block=group)
        if self._kind.has_offset:
            layer.add_weight(_OFFSETS, (rows, columns // group), torch.float32, input_block=group)
        if layer.has_bias:
            layer.add_weight("bias", (rows,), layer.dtype, input_dim=None)
        else:
            layer.register_parameter("bias", None)

    def finish_weights(self, layer: Linear) -> None:
        kind, loaded = self._kind, self._take(layer)
        weight = pack(loaded.codes, loaded.scale, loaded.offset, bits=kind.bits, group_size=kind.group_size, zero=kind.zero)
        for name in ("packed", "scale", "offset"):
            layer.register_buffer(f"grouped_{name}", getattr(weight, name))
        layer.grouped = weight  # type: ignore[assignment]

    def _take(self, layer: Linear) -> _Loaded:
        codes, scale = layer.take(_CODES), layer.take(_SCALES)
        assert codes is not None
        assert scale is not None
        return _Loaded(codes, scale, layer.take(_OFFSETS) if self._kind.has_offset else None)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return grouped_linear(x, _weight(layer), layer.bias)

    def dense_weight(self, layer: Linear) -> Tensor:
        return unpack(_weight(layer))


def _weight(layer: Linear) -> GroupedWeight:
    return layer.grouped  # type: ignore[return-value]
