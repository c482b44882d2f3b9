"""Checkpoints of HQQ: 2-, 3-, 4- and 8-bit weights with a scale and a zero point, both floats, by groups of inputs.

Format: https://github.com/mobiusml/hqq, `quantization_config` of transformers' HqqConfig.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import QuantizationSpec, hookimpl
from llmd_plugins.quantization.settings import Settings, is_among

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import Quantization


@dataclass(frozen=True, slots=True)
class HqqScheme:
    """How one linear is stored."""

    bits: int
    group_size: int | None  # input features that share a scale; None: all


class HqqConfig:
    """quantization_config, read once. Raises ModelError for what cannot be."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        settings = Settings(raw)
        self._skipped = settings.names("skip_modules")
        given = settings.table("quant_config")
        self._default: HqqScheme | None = None
        self._by_tag: dict[str, HqqScheme | None] = {}
        if "weight_quant_params" in given.raw:
            self._default = _scheme(given)
        else:  # one for each kind of module: "self_attn.q_proj" …
            self._by_tag = {tag: _scheme(given.table(tag)) if given.raw[tag] else None for tag in given.raw}
        if self._default is None and not any(self._by_tag.values()):
            raise settings.wrong("quant_config", raw.get("quant_config"), "an object with weight_quant_params")

    def scheme(self, name: str) -> HqqScheme | None:
        """How a module is stored; None: as it was."""
        if is_among(name, self._skipped):
            return None
        return next((scheme for tag, scheme in self._by_tag.items() if is_among(name, [tag])), self._default)


def _scheme(settings: Settings) -> HqqScheme:
    for key in ("scale_quant_params", "zero_quant_params", "offload_meta"):
        settings.refuse(key, "only plain scales and zero points beside the weights are read")
    weights = settings.table("weight_quant_params")
    weights.refuse("view_as_float", "weights disguised as floats are not read")
    weights.integer("axis", default=1, allowed=(1,))  # 0 groups outputs, which none of our kernels multiplies
    if not weights.flag("channel_wise", default=True):
        raise weights.wrong("channel_wise", False, "true")
    return HqqScheme(weights.integer("nbits", default=4, allowed=(2, 3, 4, 8)), weights.group_size("group_size"))


def is_hqq(settings: Mapping[str, Any]) -> bool:
    """Whether quantization_config is of this kind. Raises ModelError for what of it is not served."""
    if Settings(settings).kind != "hqq":
        return False
    HqqConfig(settings)
    return True


def _build(settings: Mapping[str, Any]) -> Quantization:
    from llmd_plugins.quantization.hqq_linear import Hqq

    return Hqq(settings)


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    summary = "HQQ checkpoints, 2 to 8 bits by groups"
    return [QuantizationSpec(name="hqq", summary=summary, build=_build, check=is_hqq)]
