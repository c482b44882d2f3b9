"""What every quantization method must keep, whoever wrote it: run by its tests, ours and those of other wheels.

spec, settings ─► Quantization ─► method of a linear ─► tensors arrive one by one ─► finish_weights ─► apply
                                                        bad ones are refused        bits kept          close to dense
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmd.errors import ModelError
from llmd.model.layers import Linear, Part, Shard, Slice, WeightSlot
from llmd.model.weight_names import TensorInfo
from llmd.model.weights import fill, held_bytes, prepare_slots

BATCHES = (1, 2, 3, 7, 16, 33, 64)
_MAGNITUDES = (1.0, 0.05, 8.0)  # of merged parts: a scale that is taken for another's shows
_FOREIGN = {"quant_method": "a-method-that-nobody-has-written"}


class QuantizedWeight(NamedTuple):
    """A weight as a checkpoint holds it."""

    tensors: Mapping[str, Tensor]  # by what follows the module's name: "qweight", "scales" …
    dense: Tensor  # float32 [out, in]: what they stand for


class QuantizationCase(NamedTuple):
    """What a method is tried with."""

    spec: Any  # QuantizationSpec
    settings: Mapping[str, Any]
    quantize: Callable[[Tensor], QuantizedWeight] | None
    tolerance: float
    device: torch.device


def check_quantization(
    spec: Any,
    *,
    max_bits: float,
    settings: Mapping[str, Any] | None = None,
    quantize: Callable[[Tensor], QuantizedWeight] | None = None,
    shapes: Sequence[tuple[int, int]] = ((37, 53), (130, 67), (1, 96)),
    memory_shape: tuple[int, int] = (896, 4864),
    ranks_shape: tuple[int, int] | None = None,
    tolerance: float = 1e-2,
    device: str = "cpu",
) -> None:
    """Try a registered quantization method; AssertionError says which promise it breaks, at which shape and by how much.

    spec: the QuantizationSpec. max_bits: what it promises to keep for a weight of `memory_shape`, scales included.
    settings: the quantization_config of checkpoints that it reads; None: it quantizes while loading (`online`).
    quantize: float32 [out, in] → a QuantizedWeight, written apart from the method; None: the checkpoint holds `weight`, and
    the method's own `dense_weight` is what outputs are compared with. shapes: (out, in) that the format can hold, odd ones
    best. tolerance: of ‖y - x Wᵀ‖ / ‖x Wᵀ‖ over all rows tried at a shape. device: where to try it; on "cuda" it is also
    captured in a graph. ranks_shape: (out, in) that two ranks can divide, by outputs and by inputs; None: not tried.

    Checked: its own settings are detected and others are not; the outputs at every shape with 1 to 64 rows, with and
    without a bias, in float32 and bfloat16; merged parts with scales of their own; tensors that arrive in any order, each
    good until the next; the bytes kept; an output head where it takes one; and that a tensor that is missing, misshapen,
    or a scale that is NaN, infinite, zero or negative is refused by its name.
    """
    case = QuantizationCase(spec, settings or {}, quantize, tolerance, torch.device(device))
    torch.manual_seed(0)
    _check_detection(case)
    for shape in shapes:
        _check_outputs(case, shape)
        _check_merged(case, shape)
        _check_order(case, shape)
        _check_refusals(case, shape)
    _check_memory(case, memory_shape, max_bits)
    if ranks_shape is not None:
        _check_ranks(case, ranks_shape)
    if case.device.type == "cuda":
        _check_capture(case, shapes[0])


# --- one linear, loaded as the loader does


@dataclass(slots=True)
class _Tensors:
    """A checkpoint in memory, whose tensors turn into garbage when the next is asked for."""

    held: dict[str, Tensor]
    order: list[str] = field(default_factory=list)

    def infos(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), "model.safetensors")
            for name, tensor in self.held.items()
        }

    def tensors(self, wanted: Mapping[str, WeightSlot]) -> Iterator[tuple[str, Tensor, str]]:
        for name in sorted(wanted, key=(self.order or list(self.held)).index):
            lent = self.held[name].clone(memory_format=torch.contiguous_format)
            yield name, lent, "weights"
            lent.view(torch.uint8 if lent.dim() else lent.dtype).zero_()

    def close(self) -> None:
        """Nothing is open."""


class _Loaded(NamedTuple):
    layer: Linear
    dense: Tensor  # float32 [out, in]
    bias: Tensor | None


def _declare(case: QuantizationCase, rows: Sequence[int], columns: int, bias: bool, dtype: torch.dtype) -> Linear:
    names = [""] if len(rows) == 1 else [f"part{index}" for index in range(len(rows))]
    parts = [Part(name, Slice(size, 0, size)) for name, size in zip(names, rows, strict=True)]
    return Linear(parts, Slice(columns, 0, columns), bias=bias, dtype=dtype, device=case.device)


def _write(case: QuantizationCase, layer: Linear, bias: bool) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """The checkpoint of a declared layer, and what its weight and bias are."""
    held: dict[str, Tensor] = {}
    dense, biases = [], []
    for index, (part, name) in enumerate(zip(layer.parts, layer.checkpoint_names, strict=True)):
        weight = torch.randn(part.rows.full, layer.columns.full) * 0.1 * _MAGNITUDES[index % len(_MAGNITUDES)]
        written = QuantizedWeight({"weight": weight}, weight) if case.quantize is None else case.quantize(weight)
        held.update({f"{name}.{suffix}": tensor for suffix, tensor in written.tensors.items()})
        dense.append(written.dense)
        if bias:
            held[f"{name}.bias"] = torch.randn(part.rows.full)
            biases.append(held[f"{name}.bias"])
    return held, torch.cat(dense), torch.cat(biases) if bias else None


def _fill(case: QuantizationCase, layer: Linear, held: dict[str, Tensor] | None, order: Sequence[str] = ()) -> Any:
    """Give the layer its method and load it; without `held` only list the slots."""
    model, block = nn.Module(), nn.Module()
    model.add_module("block", block)
    block.add_module("linear", layer)
    quantization = case.spec.build(case.settings)
    slots = prepare_slots(model, quantization)
    if held is not None:
        fill(model, slots, _Tensors(held, list(order)), lambda _: None, getattr(quantization, "ignored_weights", ()))
    return slots


def _load(
    case: QuantizationCase, rows: Sequence[int], columns: int, *, bias: bool = False, dtype: torch.dtype = torch.float32,
    order: Callable[[list[str]], list[str]] = list,
) -> _Loaded:  # fmt: skip
    layer = _declare(case, rows, columns, bias, dtype)
    layer.name = "block.linear"
    held, dense, added = _write(case, layer, bias)
    _fill(case, layer, held, order(list(held)))
    if case.quantize is None:
        dense = layer.method.dense_weight(layer)  # type: ignore[attr-defined]
    return _Loaded(layer, dense.float().to(case.device), None if added is None else added.to(dtype).float().to(case.device))


def _expected(loaded: _Loaded, x: Tensor) -> Tensor:
    y = x.float() @ loaded.dense.T
    return y if loaded.bias is None else y + loaded.bias


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm().clamp_min(1e-30))


# --- the promises


def _check_detection(case: QuantizationCase) -> None:
    quantization = case.spec.build(case.settings)
    assert not quantization.detect(_FOREIGN), "detect() claims a checkpoint of another method"
    if case.spec.check is not None:
        assert not case.spec.check(_FOREIGN), "check() claims a checkpoint of another method"
        assert case.spec.check(case.settings) or not case.settings, "check() does not know the settings that were given"
    if case.settings:
        assert quantization.detect(case.settings), "detect() does not know the settings that were given"
    else:
        assert case.spec.online, "a method without settings must be online: it quantizes while loading"


def _check_outputs(case: QuantizationCase, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for bias in (True, False):
            loaded = _load(case, [shape[0]], shape[1], bias=bias, dtype=dtype)
            words = f"{shape} in {dtype}, bias {bias}"
            found, truth = [], []
            for batch in BATCHES:
                x = torch.randn(batch, shape[1], device=case.device).to(dtype)
                found.append(loaded.layer(x))
                truth.append(_expected(loaded, x))
                assert found[-1].dtype == dtype, f"{words}: the output is {found[-1].dtype}"
                assert found[-1].shape == truth[-1].shape, f"{words}, {batch} rows: the output is {list(found[-1].shape)}"
                _must_be_close(case, found[-1], truth[-1], f"{words}, {batch} rows", slack=3)
            _must_be_close(case, torch.cat(found), torch.cat(truth), words)


def _must_be_close(case: QuantizationCase, found: Tensor, truth: Tensor, words: str, slack: float = 1) -> None:
    """`slack` where so few outputs are compared that chance has a say."""
    error = _error(found, truth)
    assert error <= case.tolerance * slack, f"{words}: relative error {error:.4f}, {case.tolerance * slack} is the most"


def _check_merged(case: QuantizationCase, shape: tuple[int, int]) -> None:
    rows = [shape[0], shape[0], shape[0] * 2]
    loaded = _load(case, rows, shape[1], bias=True)
    x = torch.randn(5, shape[1], device=case.device)
    found, expected = loaded.layer(x).split(rows, 1), _expected(loaded, x).split(rows, 1)
    for index, (part, truth) in enumerate(zip(found, expected, strict=True)):
        _must_be_close(case, part, truth, f"part {index} of merged {rows} × {shape[1]}", slack=3)


def _check_order(case: QuantizationCase, shape: tuple[int, int]) -> None:
    """Tensors of merged parts come in any order: from several files, or sorted by name."""
    x = torch.randn(3, shape[1], device=case.device)
    for order in (sorted, lambda names: sorted(names, reverse=True)):
        loaded = _load(case, [shape[0]] * 2, shape[1], bias=True, order=order)
        _must_be_close(case, loaded.layer(x), _expected(loaded, x), f"{shape}, tensors in another order", slack=3)


def _check_refusals(case: QuantizationCase, shape: tuple[int, int]) -> None:
    layer = _declare(case, [shape[0]], shape[1], False, torch.float32)
    layer.name = "block.linear"
    held, _, _ = _write(case, layer, bias=False)
    slots = _fill(case, layer, None)
    for name, slot in slots.items():
        if name not in held:
            continue
        if not slot.slot.is_optional:
            _must_refuse(case, shape, {key: tensor for key, tensor in held.items() if key != name}, name, "is missing")
        wide = torch.cat([torch.atleast_1d(held[name])] * 2)
        _must_refuse(case, shape, {**held, name: wide}, name, f"has shape {list(wide.shape)}")
    _check_bad_numbers(case, shape, held)


def _check_bad_numbers(case: QuantizationCase, shape: tuple[int, int], held: Mapping[str, Tensor]) -> None:
    """NaN and what no scale can be, at the end of each float tensor that is a scale or, on line, the weight."""
    for name, tensor in held.items():
        is_scale = "scale" in name.rpartition(".")[2] and tensor.dtype.is_floating_point
        wrong = [math.nan, math.inf, 0.0, -1.0] if is_scale else [math.nan] if case.quantize is None else []
        if tensor.dtype in (torch.float8_e4m3fn, torch.uint8):
            wrong = [math.nan] if is_scale else []
        for value in wrong:
            broken = tensor.float().clone()
            broken.view(-1)[-1] = value
            _must_refuse(case, shape, {**held, name: broken.to(tensor.dtype)}, name, f"holds {value}")


def _must_refuse(case: QuantizationCase, shape: tuple[int, int], held: dict[str, Tensor], name: str, what: str) -> None:
    layer = _declare(case, [shape[0]], shape[1], False, torch.float32)
    layer.name = "block.linear"
    try:
        _fill(case, layer, held)
    except ModelError as error:
        told = str(error)
    else:
        raise AssertionError(f"tensor {name} {what}, and nothing was raised")
    assert name in told, f"tensor {name} {what}, and the error does not name it: {told}"


def _check_memory(case: QuantizationCase, shape: tuple[int, int], max_bits: float) -> None:
    layer = _load(case, [shape[0]], shape[1], dtype=torch.bfloat16).layer
    bits = 8 * held_bytes(layer) / (shape[0] * shape[1])
    assert bits <= max_bits, f"{bits:.2f} bits a weight are kept at {shape}, {max_bits} were promised"


def _check_ranks(case: QuantizationCase, shape: tuple[int, int]) -> None:
    """Two ranks hold half of the outputs, or half of the inputs, each: beside each other, or summed, they are the whole."""
    whole = _declare(case, [shape[0], shape[0]], shape[1], False, torch.float32)
    whole.name = "block.linear"
    held, dense, _ = _write(case, whole, bias=False)
    x = torch.randn(5, shape[1], device=case.device)
    expected = x @ dense.to(case.device).T
    by_rows, by_columns = [], []
    for rank in (Shard(0, 2), Shard(1, 2)):
        rows, columns = Slice.of(shape[0], rank, "out"), Slice.of(shape[1], rank, "in")
        parts = [Part(part.name, rows) for part in whole.parts]
        some = Linear(parts, whole.columns, bias=False, dtype=torch.float32, device=case.device)
        _fill(case, some, dict(held))
        by_rows.append(some(x).unflatten(1, (2, -1)))
        some = Linear(whole.parts, columns, bias=False, dtype=torch.float32, device=case.device)
        _fill(case, some, dict(held))
        by_columns.append(some(x[:, columns.start : columns.start + columns.size]))
    _must_be_close(case, torch.cat(by_rows, 2).flatten(1), expected, f"{shape}, outputs among two ranks", slack=3)
    _must_be_close(case, by_columns[0] + by_columns[1], expected, f"{shape}, inputs among two ranks", slack=3)


def _check_capture(case: QuantizationCase, shape: tuple[int, int]) -> None:
    loaded = _load(case, [shape[0]], shape[1], dtype=torch.bfloat16)
    x = torch.zeros(4, shape[1], dtype=torch.bfloat16, device=case.device)
    for _ in range(2):
        loaded.layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = loaded.layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    _must_be_close(case, y, _expected(loaded, x), f"{shape}, replayed from a graph", slack=3)
