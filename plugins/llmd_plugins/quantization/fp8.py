"""Checkpoints with 8-bit floats: DeepSeek's blocks of 128 × 128, and a scale a tensor as AutoFP8 and Mistral write it.

Format: `quantization_config` of transformers' FineGrainedFP8Config and FbgemmFp8Config, and of vLLM's fp8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import QuantizationSpec, hookimpl
from llmd_plugins.quantization.settings import Settings, is_among

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import Quantization


class Fp8Config:
    """quantization_config, read once. Raises ModelError for what cannot be."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        settings = Settings(raw)
        settings.choice("activation_scheme", allowed=("dynamic", "static"), default="dynamic")
        settings.choice("fmt", allowed=("e4m3", "float8_e4m3fn"), default="e4m3")
        settings.choice("scale_fmt", allowed=("float", "ue8m0"), default="float")  # ue8m0: floats that are powers of two
        settings.choice("expert_dtype", allowed=("fp8",), default="fp8")
        self.by_row = settings.kind == "fbgemm_fp8"
        self.block = None if self.by_row else _block(settings)
        self.has_head = settings.flag("lm_head", default=False)
        names = ("weight_scale_inv",) if self.block else ("weight_scale",) if self.by_row else None
        self.scale_names = names or ("weight_scale_inv", "weight_scale")  # Mistral's, and everybody else's
        self.input_scale_names = ("input_scale", "activation_scale")
        self._skipped = settings.names("modules_to_not_convert", "ignored_layers")

    def is_quantized(self, name: str) -> bool | None:
        """True, or None for a module that is as it was."""
        return None if is_among(name, self._skipped) else True


def _block(settings: Settings) -> tuple[int, int] | None:
    value = settings.raw.get("weight_block_size")
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise settings.wrong("weight_block_size", value, "null or two whole numbers above 0")
    return value[0], value[1]


def is_fp8(settings: Mapping[str, Any]) -> bool:
    """Whether quantization_config is of this kind. Raises ModelError for what of it is not served."""
    if Settings(settings).kind not in ("fp8", "fbgemm_fp8"):
        return False
    Fp8Config(settings)
    return True


def _build(settings: Mapping[str, Any]) -> Quantization:
    if not is_fp8(settings):
        from llmd_plugins.quantization.fp8_online import Fp8Online

        return Fp8Online(settings)
    from llmd_plugins.quantization.fp8_linear import Fp8

    return Fp8(settings)


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    summary = "8-bit floats, by tensor, by output or by block"
    return [
        QuantizationSpec(name="fp8", summary=summary, build=_build, online=True, check=is_fp8),
        QuantizationSpec(name="fbgemm_fp8", summary="8-bit floats, by output", build=_build, check=is_fp8),
    ]
