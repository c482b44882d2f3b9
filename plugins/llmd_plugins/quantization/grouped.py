"""What methods with weights in groups share: their packed weight on a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmd.api.v1 import Linear
from llmd_kernels.grouped_linear import GroupedWeight

_TENSORS = ("packed", "scale", "offset", "columns")


def keep(layer: Linear, weight: GroupedWeight) -> None:
    """Make `weight` the layer's; as buffers, so that whoever counts or moves its memory finds it."""
    for name in _TENSORS:
        layer.register_buffer(f"grouped_{name}", getattr(weight, name))
    layer.grouped = weight  # type: ignore[assignment]


class PackedInGroups:
    """Methods whose layers keep a GroupedWeight."""

    def packed_facts(self, layer: Linear) -> dict[str, Any]:
        return {name: value for name, value in kept(layer)._asdict().items() if name not in _TENSORS}

    def restore_weights(self, layer: Linear, facts: Mapping[str, Any]) -> None:
        tensors = {name: layer._buffers[f"grouped_{name}"] for name in _TENSORS}
        layer.grouped = GroupedWeight(**tensors, **facts)  # type: ignore[assignment, arg-type]

    def expert_weight(self, layer: Linear) -> GroupedWeight:
        return kept(layer)


def kept(layer: Linear) -> GroupedWeight:
    """The layer's weight."""
    return layer.grouped  # type: ignore[return-value]
