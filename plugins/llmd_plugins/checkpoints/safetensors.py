"""Weights in safetensors files, one or sharded with an index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import CheckpointFormatSpec, hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from llmd.api.v1 import Checkpoint, ModelConfig

INDEX = "model.safetensors.index.json"


def _detect(folder: Path) -> bool:
    return (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def _build(folder: Path, config: ModelConfig) -> Checkpoint:
    from llmd_plugins.checkpoints.safetensors_files import SafetensorsCheckpoint

    return SafetensorsCheckpoint(folder)


@hookimpl
def llmd_register_checkpoint_formats() -> list[CheckpointFormatSpec]:
    return [
        CheckpointFormatSpec(
            name="safetensors", summary="safetensors files, sharded or not", detect=_detect, build=_build, order=10
        )
    ]
