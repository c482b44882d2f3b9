"""Checkpoints of bitsandbytes: NF4 and FP4 in blocks, scales maybe quantized again, and LLM.int8's weights by output.

Format: transformers' BitsAndBytesConfig; the tensors are bitsandbytes.functional.QuantState.as_dict(packed=True)'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ModelError, QuantizationSpec, hookimpl
from llmd_plugins.quantization.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import Quantization


class BitsAndBytesConfig:
    """quantization_config, read once. Raises ModelError for what cannot be."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        settings = Settings(raw)
        self.has_four_bits = settings.flag("load_in_4bit", default=False)
        if self.has_four_bits == settings.flag("load_in_8bit", default=False):
            raise ModelError("quantization_config must have one of load_in_4bit and load_in_8bit true")
        self.kind = settings.choice("bnb_4bit_quant_type", allowed=("nf4", "fp4"), default="fp4")
        self.has_nested_scales = settings.flag("bnb_4bit_use_double_quant", default=False)
        settings.choice("bnb_4bit_quant_storage", allowed=("uint8", "torch.uint8"), default="uint8")
        self.skipped = settings.names("llm_int8_skip_modules")


def is_bitsandbytes(settings: Mapping[str, Any]) -> bool:
    """Whether quantization_config is of this kind. Raises ModelError for what of it is not served."""
    if Settings(settings).kind != "bitsandbytes":
        return False
    BitsAndBytesConfig(settings)
    return True


def _build(settings: Mapping[str, Any]) -> Quantization:
    from llmd_plugins.quantization.bitsandbytes_linear import BitsAndBytes

    return BitsAndBytes(settings)


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    summary = "bitsandbytes: NF4, FP4 and LLM.int8"
    return [QuantizationSpec(name="bitsandbytes", summary=summary, build=_build, check=is_bitsandbytes)]
