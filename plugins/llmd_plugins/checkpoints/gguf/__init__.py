"""GGUF, llama.cpp's one-file models, as they are: the file is a source of models, a format of weights and a quantization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import CheckpointFormatSpec, ModelSourceSpec, QuantizationSpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import Checkpoint, LoadProgress, ModelConfig, Quantization


def _claims(config: ModelConfig) -> bool:
    from llmd_plugins.checkpoints.gguf.folder import claims

    return claims(config)


def _resolve(config: ModelConfig, report: Callable[[LoadProgress], None]) -> Path:
    from llmd_plugins.checkpoints.gguf.folder import resolve

    return resolve(config, report)


def _check(config: ModelConfig) -> str | None:
    from llmd_plugins.checkpoints.gguf.folder import check

    return check(config)


def _detect(folder: Path) -> bool:
    return any(folder.glob("*.gguf"))


def _open(folder: Path, config: ModelConfig) -> Checkpoint:
    from llmd_plugins.checkpoints.gguf.weights import GgufCheckpoint

    return GgufCheckpoint(folder)


def _is_gguf(settings: Mapping[str, Any]) -> bool:
    return settings.get("quant_method") == "gguf"


def _quantization(settings: Mapping[str, Any]) -> Quantization:
    from llmd_plugins.checkpoints.gguf.weights import Gguf

    return Gguf(settings)


@hookimpl
def llmd_register_model_sources() -> list[ModelSourceSpec]:
    """A .gguf file here or at the hub."""
    return [ModelSourceSpec(name="gguf", summary="a .gguf file", claims=_claims, resolve=_resolve, check=_check, order=5)]


@hookimpl
def llmd_register_checkpoint_formats() -> list[CheckpointFormatSpec]:
    """Its tensors."""
    return [
        CheckpointFormatSpec(name="gguf", summary="a GGUF file, whole or in parts", detect=_detect, build=_open, order=20)
    ]


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    """Its types of linears."""
    summary = "GGUF's blocks: Q4_0 to Q8_0, Q4_K to Q6_K"
    return [QuantizationSpec(name="gguf", summary=summary, build=_quantization, check=_is_gguf)]
