"""Weights on their way: what a checkpoint gives, which layer wants it, and each layer finished as soon as it is whole."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from llmd.engine.executor import LoadProgress
from llmd.errors import ModelError
from llmd.model.device_stream import DeviceStream, TensorPlace
from llmd.model.layers import Embedding, Layer, Linear, LMHead, WeightSlot
from llmd.model.quantization import Quantization, Unquantized
from llmd.model.weight_memory import WeightMemory
from llmd.model.weight_names import Slot, TensorInfo, is_shape, match_names, some, wrong_shape

_TRIMS = 16  # of the heap, while a checkpoint loads


class Checkpoint(Protocol):
    """Weights in files. `tensors` is asked once, for the names that are wanted, and yields in the order of the files."""

    def infos(self) -> Mapping[str, TensorInfo] | None:
        """Every tensor there is; None when it gives whatever is asked for."""

    def tensors(self, wanted: Mapping[str, WeightSlot]) -> Iterator[tuple[str, torch.Tensor, str]]:
        """(name, tensor, phase in words) of each wanted tensor, which is good until the next one is asked for."""

    def close(self) -> None:
        """Let go of the files."""


class PlacedCheckpoint(Checkpoint, Protocol):
    """One that may also say where tensors lie in files, as they are: on a GPU they are streamed from there."""

    def places(self, wanted: Mapping[str, WeightSlot]) -> Sequence[TensorPlace]:
        """Each wanted tensor's place, file by file and in the order of the files."""


def prepare_slots(module: nn.Module, quantization: Quantization | None) -> dict[str, Slot]:
    """Name the layers, give each linear its method, and list every tensor that the checkpoint must hold."""
    slots: dict[str, Slot] = {}
    for name, child in list(module.named_modules()):
        if isinstance(child, Layer):
            child.name = name
            _give_method(child, quantization)
            for slot in child.weight_slots():
                slots[slot.name] = Slot.of(slot, child)
        elif child._parameters:
            raise ModelError(
                f"{type(child).__name__} at {name!r} holds parameters but is no layer from `layers`: a subclass of "
                "llmd.api.v1.Layer declares its own with add_parameter"
            )
    return slots


def _give_method(layer: Layer, quantization: Quantization | None) -> None:
    """Linears get a method; a head of its own gets one where the quantization has a `head_method`."""
    if isinstance(layer, Linear):
        method = quantization.method(layer) if quantization is not None else None
        layer.method = method or Unquantized()
        layer.method.create_weights(layer)
    elif isinstance(layer, LMHead) and not layer.is_tied:
        choose = getattr(quantization, "head_method", None)
        linear = layer.as_linear()
        if choose is not None and (head_method := choose(linear)) is not None:
            layer.quantize(linear, head_method)
    elif isinstance(layer, Embedding) and layer.holds_tokens:
        choose = getattr(quantization, "table_method", None)
        layer.method = choose(layer) if choose is not None else None


def give_memory(module: nn.Module) -> WeightMemory:
    """Huge pages for all layers, where the system has them."""
    memory = WeightMemory()
    for child in module.modules():
        if isinstance(child, Layer):
            child.memory = memory
    return memory


def held_bytes(module: nn.Module) -> int:
    """What the weights take as they are kept: every parameter, and what methods of linears keep beside them."""
    tensors: list[torch.Tensor] = list(module.parameters())
    for child in module.modules():
        if isinstance(child, Linear | Embedding):
            tensors += [buffer for buffer in child._buffers.values() if buffer is not None]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def fill(
    module: nn.Module,
    slots: Mapping[str, Slot],
    checkpoint: Checkpoint,
    report: Callable[[LoadProgress], None],
    ignored: Sequence[str] = (),
    *,
    memory: WeightMemory | None = None,
    whole: Collection[nn.Module] = (),
    stream: DeviceStream | None = None,
) -> None:
    """Read every slot's tensor, and finish each layer as soon as it is whole; `ignored` are patterns of other tensors.

    memory: where a CPU's weights are kept.
    stream: the way to a GPU; slots are then handed tensors that are there.
    whole: layers that need nothing of the checkpoint, which must hold their tensors all the same.
    """
    wanted = match_names(module, slots, checkpoint.infos(), ignored)
    wanted = {name: slot for name, slot in wanted.items() if slot.module not in whole}
    missing = Counter(slot.module for slot in wanted.values())
    trim = _Trimming(sum(slot.num_bytes for slot in wanted.values()))
    done, ready = 0, None
    arriving = _arriving(checkpoint, {name: slot.slot for name, slot in wanted.items()}, stream)
    with torch.inference_mode(), contextlib.closing(arriving):
        for name, tensor, phase in arriving:
            _finish(ready, memory)  # not before the checkpoint has let go of the layer's last tensor: that is memory too
            slot = wanted[name]
            if not is_shape(tuple(tensor.shape), slot.slot.shape):
                raise wrong_shape(name, tuple(tensor.shape), slot.slot.shape)
            slot.slot.load(tensor.view(slot.slot.shape))
            del tensor
            missing[slot.module] -= 1
            ready = None if missing[slot.module] else slot.module
            done += slot.num_bytes
            report(LoadProgress(phase, done / trim.total))
            trim.after(done)
        _finish(ready, memory)
    unfilled = [name for name, slot in wanted.items() if missing[slot.module]]
    if unfilled:
        raise ModelError(f"the checkpoint lacks {some(unfilled)}")


def _arriving(
    checkpoint: Checkpoint, wanted: Mapping[str, WeightSlot], stream: DeviceStream | None
) -> Generator[tuple[str, torch.Tensor, str], None, None]:
    """The checkpoint's tensors, on the device where there is a way to it."""
    places = getattr(checkpoint, "places", None)
    if stream is None:
        yield from checkpoint.tensors(wanted)
    elif places is not None:
        yield from stream.read(places(wanted))
    else:
        for name, tensor, phase in checkpoint.tensors(wanted):
            there = stream.send(tensor)
            del tensor
            yield name, there, phase


def _finish(module: nn.Module | None, memory: WeightMemory | None) -> None:
    if not isinstance(module, Layer):
        return
    module.finish_weights()
    if memory is not None:
        for tensor in (*module.parameters(), *module.buffers()):
            memory.adopt(tensor)


class _Trimming:
    """The originals of quantized layers leave holes in the heap, which is trimmed now and then."""

    def __init__(self, total: int) -> None:
        self.total = total or 1
        self._last = 0

    def after(self, done: int) -> None:
        if done - self._last > self.total / _TRIMS:
            trim_heap()
            self._last = done


def trim_heap() -> None:
    """Give freed temporaries back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
