"""From an adapter as its files hold it to what is copied into slots: cut to this rank, scaled, in the slots' dtype.

Runs beside the steps, in a thread of its own; of the model it only reads. DoRA (https://arxiv.org/abs/2402.09353) brings
each row of W + s·B·A to a learnt length m: with c = m / ‖W + s·B·A‖ the layer gives c·W·x + c·s·B·A·x + bias, so c goes
into B and into a scale of the base's output, and nothing is left to compute in a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmd.errors import AdapterError
from llmd.model.adapter_slots import AdapterTable, LayerSlots, PackedAdapter, PackedLayer, PackedPart, Place
from llmd.model.adapters import Adapter, LowRank
from llmd.model.layers import Embedding, Linear

_ROWS_AT_ONCE = 1024


@torch.inference_mode()
def pack(adapter: Adapter, table: AdapterTable) -> PackedAdapter:
    """Lay out an adapter for the table's slots. Raises AdapterError for what the base cannot do."""
    layers: dict[str, PackedLayer] = {}
    for module, low_rank in adapter.modules.items():
        for name, place in _places(module, table):
            _pack_module(module, low_rank, table.layers[name], place, layers.setdefault(name, PackedLayer(parts={})))
    for module, bias in adapter.biases.items():
        for name, place in _places(module, table):
            slots = table.layers[name]
            _add_bias(layers.setdefault(name, PackedLayer(parts={})), slots, place, _bias_change(module, bias, slots, place))
    for module, weight in adapter.copies.items():
        for name, _ in _places(module, table):
            _check_copy(module, weight, table.layers[name])
    pinned = {name: _pinned(layer, table.layers[name].layer.device) for name, layer in layers.items()}
    return PackedAdapter(layers=pinned, rank=adapter.rank, num_bytes=sum(map(_num_bytes, pinned.values())))


def _places(module: str, table: AdapterTable) -> list[tuple[str, Place]]:
    if module not in table.places:
        raise AdapterError(f"module {module} of the base model has no room for adapters; check lora_target_modules")
    return table.places[module]


def _pack_module(module: str, low_rank: LowRank, slots: LayerSlots, place: Place, packed: PackedLayer) -> None:
    if place.part in packed.parts:
        raise AdapterError(f"the adapter changes {module} twice, merged and apart")
    a, b = low_rank.a[:, place.columns], low_rank.b[place.rows].float() * low_rank.scaling
    extra = None if low_rank.b_bias is None else low_rank.b_bias[place.rows].float() * low_rank.scaling
    if low_rank.magnitude is not None:
        change = _scale(module, a.float(), b, low_rank.magnitude[place.rows].float(), slots, place)
        b = b * change.unsqueeze(1)
        extra = None if extra is None else extra * change
        packed.scale = _spread(packed.scale, slots, place, change, 1.0)
    if extra is not None:
        _add_bias(packed, slots, place, extra)
    a = a.T if slots.is_embedding else a
    packed.parts[place.part] = PackedPart(a.to(slots.dtype).contiguous(), b.T.to(slots.dtype).contiguous())


def _spread(vector: Tensor | None, slots: LayerSlots, place: Place, values: Tensor, neutral: float) -> Tensor:
    """Values of one part among all outputs of its layer."""
    if vector is None:
        vector = torch.full((slots.out_features,), neutral, dtype=torch.float32)
    vector[place.offset : place.offset + len(values)] = values
    return vector


def _add_bias(packed: PackedLayer, slots: LayerSlots, place: Place, values: Tensor) -> None:
    """Add to the outputs of one part; of ranks that share an input only the first does, for their sums are added up."""
    reduce = slots.layer.reduce if isinstance(slots.layer, Linear) else None
    if reduce is not None and reduce.rank:
        return
    before = _spread(None, slots, place, values, 0.0)
    packed.bias = before if packed.bias is None else packed.bias + before


def _bias_change(module: str, bias: Tensor, slots: LayerSlots, place: Place) -> Tensor:
    """What takes the base's bias to the adapter's."""
    base = slots.layer._parameters.get("bias")
    if base is None:
        raise AdapterError(f"tensor {module}.bias: the base model has no bias there")
    new = bias[place.rows].float()
    return new - base[place.offset : place.offset + len(new)].float().cpu()


def _scale(module: str, a: Tensor, b: Tensor, magnitude: Tensor, slots: LayerSlots, place: Place) -> Tensor:
    """[out] float32: DoRA's magnitudes over the norms of the rows of W + b·a."""
    layer = slots.layer
    if isinstance(layer, Linear) and layer.reduce is not None:
        raise AdapterError(f"tensor {module}.lora_magnitude_vector: DoRA is not served where ranks share a layer's input")
    weight = _dense_weight(module, layer)
    weight = weight.T if isinstance(layer, Embedding) else weight[place.offset : place.offset + len(b)]
    norms = []
    for start in range(0, len(b), _ROWS_AT_ONCE):  # float32 copies of a few rows, not of the whole weight
        some = slice(start, start + _ROWS_AT_ONCE)
        norms.append(torch.linalg.vector_norm(weight[some].float().cpu() + b[some] @ a, dim=1))
    return magnitude / torch.cat(norms)


def _dense_weight(module: str, layer: object) -> Tensor:
    """[out, in], or an embedding's table."""
    if not isinstance(layer, Linear):
        return layer.table  # type: ignore[attr-defined]
    dense = getattr(layer.method, "dense_weight", None)
    if dense is None:
        raise AdapterError(
            f"tensor {module}.lora_magnitude_vector: DoRA needs the base's weight, which {type(layer.method).__name__} "
            "cannot give back"
        )
    weight: Tensor = dense(layer)
    return weight


def _check_copy(module: str, weight: Tensor, slots: LayerSlots) -> None:
    """PEFT saves a table of the base along with an adapter of it: then it must be the base's own."""
    base = _dense_weight(module, slots.layer)
    if weight.shape != base.shape or not torch.equal(weight.to(base.dtype), base.cpu()):
        raise AdapterError(f"tensor {module}.weight replaces the base model's whole weight (modules_to_save): not served")


def _pinned(layer: PackedLayer, device: torch.device) -> PackedLayer:
    """On a GPU's host: memory that copies run from by themselves."""
    if device.type != "cuda":
        return layer
    parts = {index: PackedPart(part.a.pin_memory(), part.b.pin_memory()) for index, part in layer.parts.items()}
    return PackedLayer(parts=parts, scale=layer.scale, bias=layer.bias)


def _num_bytes(layer: PackedLayer) -> int:
    vectors = [vector for vector in (layer.scale, layer.bias) if vector is not None]
    return sum(part.a.nbytes + part.b.nbytes for part in layer.parts.values()) + sum(vector.nbytes for vector in vectors)
