"""Checkpoints of gpt-oss: 4-bit floats, a power of two for each 32 of them as their scale.

Format: `quantization_config` of transformers' Mxfp4Config; https://huggingface.co/openai/gpt-oss-20b.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import QuantizationSpec, hookimpl
from llmd_plugins.quantization.settings import Settings, is_among

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import Quantization


class Mxfp4Config:
    """quantization_config, read once. Raises ModelError for what cannot be."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._skipped = Settings(raw).names("modules_to_not_convert")

    def is_quantized(self, name: str) -> bool | None:
        """True, or None for a module that is as it was."""
        return None if is_among(name, self._skipped) else True


def is_mxfp4(settings: Mapping[str, Any]) -> bool:
    """Whether quantization_config is of this kind. Raises ModelError for what of it is not served."""
    if Settings(settings).kind != "mxfp4":
        return False
    Mxfp4Config(settings)
    return True


def _build(settings: Mapping[str, Any]) -> Quantization:
    from llmd_plugins.quantization.mxfp4_linear import Mxfp4

    return Mxfp4(settings)


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    summary = "4-bit floats with a power of two for each 32"
    return [QuantizationSpec(name="mxfp4", summary=summary, build=_build, check=is_mxfp4)]
