"""Random weights without files, to measure speed and memory of a model that was not downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import CheckpointFormatSpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from llmd.api.v1 import Checkpoint, ModelConfig, WeightSlot


class DummyCheckpoint:
    """Seeded uniform values, small enough that activations stay finite; norms are ones."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def infos(self) -> None:
        return None

    def tensors(self, wanted: Mapping[str, WeightSlot]) -> Iterator[tuple[str, Tensor, str]]:
        import torch

        generator = torch.Generator().manual_seed(self._seed)
        pool = torch.empty(1 << 20).uniform_(-0.03, 0.03, generator=generator).to(torch.bfloat16)
        for name, slot in wanted.items():
            size = torch.Size(slot.shape).numel()
            if len(slot.shape) == 1 and "norm" in name:
                yield name, torch.ones(slot.shape), "random weights"
                continue
            # Drawn once and repeated with a shift: as random as a benchmark needs, at the speed of a copy.
            shift = int(torch.randint(len(pool), (), generator=generator))
            tensor = pool.roll(shift).repeat(-(-size // len(pool)))[:size]
            yield name, tensor.view(slot.shape), "random weights"

    def close(self) -> None:
        """Nothing is open."""


def _detect(folder: Path) -> bool:
    return False  # only by name


def _build(folder: Path, config: ModelConfig) -> Checkpoint:
    return DummyCheckpoint(config.seed)


@hookimpl
def llmd_register_checkpoint_formats() -> list[CheckpointFormatSpec]:
    return [CheckpointFormatSpec(name="dummy", summary="random weights, no files", detect=_detect, build=_build, order=1000)]
