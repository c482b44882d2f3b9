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
    """Seeded uniform values, small enough that activations stay finite; norms are ones.

    They are drawn on the host, so that they are the same for all devices, and made as many as are wanted where the model is.
    """

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self._seed = seed
        self._device = device

    def infos(self) -> None:
        return None

    def tensors(self, wanted: Mapping[str, WeightSlot]) -> Iterator[tuple[str, Tensor, str]]:
        import torch

        generator = torch.Generator().manual_seed(self._seed)
        pool = torch.empty(1 << 20).uniform_(-0.03, 0.03, generator=generator).to(torch.bfloat16).to(self._device)
        for name, slot in wanted.items():
            size = torch.Size(slot.shape).numel()
            if len(slot.shape) == 1 and "norm" in name:
                yield name, torch.ones(slot.shape, device=self._device), "random weights"
                continue
            # Drawn once and repeated with a shift: as random as a benchmark needs, at the speed of a copy.
            shift = int(torch.randint(len(pool), (), generator=generator))
            tensor = pool.roll(shift).repeat(-(-size // len(pool)))[:size]
            yield name, _as_kept(name, tensor, slot).view(slot.shape), "random weights"

    def close(self) -> None:
        """Nothing is open."""


def _as_kept(name: str, tensor: Tensor, slot: WeightSlot) -> Tensor:
    """Codes of a quantization are any bits, its scales are above 0."""
    if "scale" in name.rpartition(".")[2]:
        is_code = slot.dtype is not None and slot.dtype.itemsize == 1  # an exponent, or a small float
        return tensor.new_full(tensor.shape, 1) if is_code else tensor.abs().add_(1e-3)
    if slot.dtype is None or slot.dtype.is_floating_point:
        return tensor
    return tensor.mul(1 << 30).to(slot.dtype)


def _detect(folder: Path) -> bool:
    return False  # only by name


def _build(folder: Path, config: ModelConfig) -> Checkpoint:
    import torch

    has_gpu = config.device != "cpu" and torch.cuda.is_available()
    return DummyCheckpoint(config.seed, ("cuda" if config.device == "auto" else config.device) if has_gpu else "cpu")


@hookimpl
def llmd_register_checkpoint_formats() -> list[CheckpointFormatSpec]:
    return [CheckpointFormatSpec(name="dummy", summary="random weights, no files", detect=_detect, build=_build, order=1000)]
