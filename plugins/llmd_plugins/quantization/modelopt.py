"""Checkpoints of NVIDIA's ModelOpt: FP8 with a scale a tensor, and NVFP4.

Format: https://github.com/NVIDIA/Model-Optimizer, hf_quant_config.json or the same in config.json's quantization_config.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import QuantizationSpec, hookimpl
from llmd_plugins.quantization.settings import Settings, is_among

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import Quantization

_KINDS = ("modelopt", "modelopt_fp4")


class ModelOptConfig:
    """quantization_config, read once. Raises ModelError for what cannot be."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        settings = Settings(raw)
        settings = settings.table("quantization") if "quantization" in raw else settings
        self.is_fp4 = settings.choice("quant_algo", allowed=("fp8", "nvfp4"), default="") == "nvfp4"
        self.group_size = settings.integer("group_size", default=16, allowed=(16,)) if self.is_fp4 else None
        self._skipped = settings.names("ignore", "exclude_modules")

    def is_quantized(self, name: str) -> bool | None:
        """True, or None for a module that is as it was: a list's names may hold `*`."""
        plain = [pattern for pattern in self._skipped if "*" not in pattern]
        wild = [pattern for pattern in self._skipped if "*" in pattern]
        return None if is_among(name, plain) or any(fnmatchcase(name, pattern) for pattern in wild) else True


def is_modelopt(settings: Mapping[str, Any]) -> bool:
    """Whether quantization_config is of this kind. Raises ModelError for what of it is not served."""
    if Settings(settings).kind not in _KINDS:
        return False
    ModelOptConfig(settings)
    return True


def _build(settings: Mapping[str, Any]) -> Quantization:
    from llmd_plugins.quantization.modelopt_linear import ModelOpt

    return ModelOpt(settings)


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    summary = "ModelOpt checkpoints, FP8 and NVFP4"
    return [QuantizationSpec(name=name, summary=summary, build=_build, check=is_modelopt) for name in _KINDS]
