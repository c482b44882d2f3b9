"""Checkpoints of AutoAWQ in its GEMM packing: 4-bit weights with a scale and a zero point by groups of inputs.

Format: https://github.com/casper-hansen/AutoAWQ, `quantization_config` of transformers' AwqConfig.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import QuantizationSpec, hookimpl
from llmd_plugins.quantization.settings import Settings, is_among

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import Quantization

_KINDS = ("awq", "awq_marlin")
_PACKINGS = ("gemm", "exllama", "ipex")  # the last two name a kernel for the first's files


class AwqConfig:
    """quantization_config, read once. Raises ModelError for what cannot be."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        settings = Settings(raw)
        if str(raw.get("backend", "")).lower() == "llm-awq":
            raise settings.wrong("backend", raw["backend"], "of AutoAWQ's packing (llm-awq has its own, which is not read)")
        settings.choice("version", "format", "checkpoint_format", allowed=_PACKINGS, default="gemm")
        settings.integer("bits", "w_bit", default=4, allowed=(4,))
        self.group_size = settings.group_size("group_size", "q_group_size", default=128)
        self.has_zeros = settings.flag("zero_point", default=True)
        self.has_head = settings.flag("lm_head", default=False)
        self._skipped = settings.names("modules_to_not_convert")

    def is_quantized(self, name: str) -> bool | None:
        """True, or None for a module that is as it was."""
        return None if is_among(name, self._skipped) else True


def is_awq(settings: Mapping[str, Any]) -> bool:
    """Whether quantization_config is of this kind. Raises ModelError for what of it is not served."""
    if Settings(settings).kind not in _KINDS:
        return False
    AwqConfig(settings)
    return True


def _build(settings: Mapping[str, Any]) -> Quantization:
    from llmd_plugins.quantization.awq_linear import Awq

    return Awq(settings)


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    summary = "AWQ checkpoints, 4 bits by groups"
    return [QuantizationSpec(name=name, summary=summary, build=_build, check=is_awq) for name in _KINDS]
