"""What methods with weights in groups share: their packed weight on a layer, and a dense one cut into groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from llmd.api.v1 import Linear
from llmd_kernels.grouped_linear import GroupedWeight

_TENSORS = ("packed", "scale", "offset", "columns")
_ELEMENTS_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}  # in float32: what stays in a cache; what keeps a GPU busy


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


def kept(layer: Linear) -> GroupedWeight:
    """The layer's weight."""
    return layer.grouped  # type: ignore[return-value]


def parts(weight: Tensor) -> Iterator[slice]:
    """Rows of [N, K] to be worked on one after another, so that wide copies are of a few rows, not of the whole weight."""
    num_rows = max(1, _ELEMENTS_AT_ONCE.get(weight.device.type, 1 << 18) // weight.shape[1])
    for start in range(0, weight.shape[0], num_rows):
        yield slice(start, start + num_rows)


def by_group(rows: Tensor, group_size: int) -> Tensor:
    """[N, K] → float32 [group_size, N · ceil(K / group_size)], a group a column, zeros behind the last one's end.

    Sums over the first dim run along the lanes of a vector unit; over a short last dim they do not.
    """
    short = -rows.shape[1] % group_size
    return torch.nn.functional.pad(rows.float(), (0, short)).view(-1, group_size).T.contiguous()
