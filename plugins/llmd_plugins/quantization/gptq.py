"""Checkpoints of GPTQModel and AutoGPTQ: 2-, 3-, 4- and 8-bit weights with a scale and a zero point by groups of inputs.

Format: https://github.com/ModelCloud/GPTQModel, `quantization_config` of transformers' GPTQConfig.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import QuantizationSpec, hookimpl
from llmd_plugins.quantization.settings import Settings, is_among, matches

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import Quantization

_KINDS = ("gptq", "gptq_marlin", "gptqmodel")
_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class GptqScheme:
    """How one linear is stored."""

    bits: int
    group_size: int | None  # input features that share a scale; None: all
    desc_act: bool  # groups are of input features in an order of their own
    zeros_less_one: bool  # zero points are stored less one (format "gptq", not "gptq_v2")


class GptqConfig:
    """quantization_config, read once. Raises ModelError for what cannot be."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        settings = Settings(raw)
        settings.refuse("is_marlin_format", "weights packed for the Marlin kernel alone are not read")
        form = settings.choice("checkpoint_format", "format", allowed=("gptq", "gptq_v2"), default="gptq")
        settings.choice("pack_dtype", allowed=("int32",), default="int32")
        self._default = _scheme(settings, GptqScheme(0, 128, False, form == "gptq"))
        self._skipped = settings.names("modules_to_not_convert")
        self._chosen = settings.names("modules_in_block_to_quantize")
        self.has_head = settings.flag("lm_head", default=False)
        rules = settings.table("dynamic")
        self._rules = [(key, _scheme(rules.table(key), self._default)) for key in rules.raw]

    def scheme(self, name: str) -> GptqScheme | None:
        """How a module is stored; None: as it was. The first rule of `dynamic` that matches decides."""
        for pattern, scheme in self._rules:
            if matches(pattern.removeprefix("-:").removeprefix("+:"), name):
                return None if pattern.startswith("-:") else scheme
        if is_among(name, self._skipped) or (self._chosen and name != "lm_head" and not is_among(name, self._chosen)):
            return None
        return self._default


def _scheme(settings: Settings, default: GptqScheme) -> GptqScheme:
    return replace(
        default,
        bits=settings.integer("bits", default=default.bits or None, allowed=_BITS),
        group_size=settings.group_size("group_size", default=default.group_size),
        desc_act=settings.flag("desc_act", default=default.desc_act),
    )


def is_gptq(settings: Mapping[str, Any]) -> bool:
    """Whether quantization_config is of this kind. Raises ModelError for what of it is not served."""
    if Settings(settings).kind not in _KINDS:
        return False
    GptqConfig(settings)
    return True


def _build(settings: Mapping[str, Any]) -> Quantization:
    from llmd_plugins.quantization.gptq_linear import Gptq

    return Gptq(settings)


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    summary = "GPTQ checkpoints, 2 to 8 bits by groups"
    return [QuantizationSpec(name=name, summary=summary, build=_build, check=is_gptq) for name in ("gptq", "gptq_marlin")]
