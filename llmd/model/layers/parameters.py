"""Weights that know how to load themselves: what a layer tells the loader about each tensor of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from llmd.errors import ModelError
from llmd.model.weight_memory import WeightMemory, copy_into, scratch


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of every split weight this process holds; one device is rank 0 of 1."""

    rank: int = 0
    world: int = 1

    def part(self, size: int, what: str) -> int:
        """`size` divided among the ranks; ModelError when it does not divide."""
        if size % self.world:
            raise ModelError(f"{what} ({size}) cannot be divided among {self.world} ranks")
        return size // self.world

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks; nothing to do for one."""
        if self.world == 1:
            return x
        raise NotImplementedError("a runner over several ranks brings its own Shard")


class Slice(NamedTuple):
    """Elements [start, start + size) of one dim of a checkpoint tensor that has `full` of them."""

    full: int
    start: int
    size: int

    @classmethod
    def of(cls, full: int, shard: Shard | None, what: str) -> Slice:
        """This rank's equal share, or everything when `shard` is None."""
        if shard is None:
            return cls(full, 0, full)
        size = shard.part(full, what)
        return cls(full, shard.rank * size, size)

    def scaled(self, ratio: int) -> Slice:
        """The same share of a dim whose elements each stand for `ratio` (packed bits, quantization groups)."""
        return Slice(-(-self.full // ratio), self.start // ratio, -(-self.size // ratio))


class WeightSlot(NamedTuple):
    """One tensor that the checkpoint must hold: its name there, its whole shape, and what to do with it."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[torch.Tensor], None]
    dtype: torch.dtype | None = None  # what it is kept in; None: whatever comes is fine
    is_optional: bool = False  # the checkpoint may lack it


class Slots(Protocol):
    """Adapters of a layer, as it sees them."""

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The layer's output y for input x with what the adapters of the step's rows add; y may be overwritten."""


class Layer(nn.Module):
    """A module whose parameters are declared on the meta device and get memory when their first part arrives."""

    name: str = ""  # where it stands in the model; set by the loader
    device: torch.device  # where its memory will be
    memory: WeightMemory | None = None  # what weights are kept in while they load on a CPU; set by the loader

    def add_parameter(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Declare a parameter of this rank's shape."""
        self.register_parameter(
            name, nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device="meta"), requires_grad=False)
        )

    def materialize(self, name: str) -> torch.Tensor:
        """The parameter's data, with memory."""
        parameter = self._parameters[name]
        assert parameter is not None
        if parameter.is_meta:
            data = self._allocate(parameter.shape, parameter.dtype)
            self._parameters[name] = nn.Parameter(data, requires_grad=False)
            return data
        return parameter.data

    @property
    def keeps_weights(self) -> bool:
        """Whether what is loaded is what will be read, not what that will be made of."""
        return True

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if self.memory is None:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        return self.memory.empty(shape, dtype) if self.keeps_weights else scratch(shape, dtype)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """What this layer wants from the checkpoint; here: each parameter, whole, under its own name."""
        for name, parameter in self._parameters.items():
            if parameter is not None:
                yield WeightSlot(f"{self.name}.{name}", tuple(parameter.shape), self._loader(name), parameter.dtype)

    def finish_weights(self) -> None:
        """Called once when the last of the layer's weights has arrived."""

    def _loader(self, name: str) -> Callable[[torch.Tensor], None]:
        return lambda tensor: copy_into(self.materialize(name), tensor)
