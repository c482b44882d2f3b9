"""One linear of every expert of a layer, stored as its format stores it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from llmd_kernels.fp8_linear import Activations, fp8_linear
from llmd_kernels.grouped_linear import GroupedWeight, grouped_linear
from llmd_kernels.int8_linear import Int8Weight, int8_linear
from llmd_kernels.linear import linear


class Fp8Weight(NamedTuple):
    """W [N, K] as `fp8_linear` takes it."""

    weight: torch.Tensor  # float8_e4m3fn [N, K]
    scale: torch.Tensor  # one number, [N], [N, 1] or the blocks' grid
    block: tuple[int, int] | None  # rows and columns of W that share a scale; None: as the scale's shape tells
    activations: Activations
    x_scale: torch.Tensor | None  # one number, with activations "tensor"


Weight = torch.Tensor | GroupedWeight | Int8Weight | Fp8Weight
"""W [N, K] of one expert: dense in a float dtype, or packed."""


class ExpertWeights:
    """W of all experts of a layer, by their numbers: of one format, size, device, and of the same facts.

    `stacked` is the same with the experts in front, where they lie so: a GPU's kernels need it. The tensors must stay where
    they are as long as this is in use. Raises ValueError for experts that differ.
    """

    def __init__(self, each: Sequence[Weight], stacked: Weight | None = None) -> None:
        if not each:
            raise ValueError("ExpertWeights wants one expert at least, got none")
        self.each = tuple(each)
        self.stacked = stacked
        self.factors: torch.Tensor | None = None  # float32 [E], of GroupedWeights that are stacked
        self.x_scale: torch.Tensor | None = None  # of Fp8Weights that are stacked: the largest of the experts'
        self.out_features, self.in_features = size_of(each[0])
        facts = facts_of(each[0])
        for number, weight in enumerate(each):
            if facts_of(weight) != facts:
                raise ValueError(f"ExpertWeights wants experts alike, expert {number} is {facts_of(weight)}, not {facts}")

        if isinstance(stacked, GroupedWeight):
            factors = [weight.factor for weight in each if isinstance(weight, GroupedWeight)]
            self.factors = torch.tensor(factors, dtype=torch.float32).to(stacked.packed.device)
        elif isinstance(stacked, Fp8Weight) and stacked.x_scale is not None:
            self.x_scale = stacked.x_scale.float().amax()

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return len(self.each)

    @property
    def kind(self) -> type:
        """torch.Tensor, GroupedWeight, Int8Weight or Fp8Weight."""
        return type(self.each[0]) if not isinstance(self.each[0], torch.Tensor) else torch.Tensor


class Stack:
    """Brings the experts' weights into one tensor for each of theirs, one after another, so that none is held twice."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._facts: tuple[object, ...] | None = None
        self._taken: set[int] = set()
        self._weight: Weight | None = None

    def take(self, number: int, weight: Weight) -> None:
        """Move the tensors of an expert's weight into the stack, in place: all who hold them go on with them.

        The first expert says how they look; one that differs stays where it is, and there will be no stack.
        """
        if self._weight is None:
            self._facts, self._weight = facts_of(weight), _map(weight, self._room)
        if facts_of(weight) != self._facts:
            return
        for tensor, home in zip(_tensors(weight), _tensors(self._weight), strict=True):
            home[number].copy_(tensor)
            tensor.set_(home[number])  # type: ignore[call-overload]
        self._taken.add(number)

    @property
    def weight(self) -> Weight | None:
        """All experts' [E, …]; None unless all were taken."""
        return self._weight if len(self._taken) == self._num_experts else None

    def _room(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(self._num_experts, *tensor.shape, dtype=tensor.dtype, device=tensor.device)


def apply(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """x [M, K] · Wᵀ → [M, N] in x's dtype, by the format's own op."""
    if isinstance(weight, GroupedWeight):
        return grouped_linear(x, weight)
    if isinstance(weight, Int8Weight):
        return int8_linear(x, weight)
    if isinstance(weight, Fp8Weight):
        return fp8_linear(
            x, weight.weight, weight.scale, block=weight.block, activations=weight.activations, x_scale=weight.x_scale
        )
    return linear(x, weight)


def size_of(weight: Weight) -> tuple[int, int]:
    """(N, K)"""
    if isinstance(weight, GroupedWeight):
        return weight.out_features, weight.in_features
    if isinstance(weight, Int8Weight):
        return weight.scale.shape[0], weight.in_features
    dense = weight.weight if isinstance(weight, Fp8Weight) else weight
    return dense.shape[0], dense.shape[1]


def facts_of(weight: Weight) -> tuple[object, ...]:
    """What must be the same for all experts: everything but the values of tensors, and factors."""
    if isinstance(weight, torch.Tensor):
        return _shape(weight)
    named = weight._asdict()
    named.pop("factor", None)
    return (
        type(weight).__name__,
        *(_shape(value) if isinstance(value, torch.Tensor) else value for value in named.values()),
    )


def _shape(tensor: torch.Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _map(weight: Weight, change: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
    if isinstance(weight, torch.Tensor):
        return change(weight)
    changed: dict[str, Any] = {
        name: change(value) for name, value in weight._asdict().items() if isinstance(value, torch.Tensor)
    }
    return weight._replace(**changed)


def _tensors(weight: Weight) -> list[torch.Tensor]:
    if isinstance(weight, torch.Tensor):
        return [weight]
    return [value for value in weight if isinstance(value, torch.Tensor)]
