"""NF4 weights, quantized while a 16- or 32-bit checkpoint loads: 4 bits spread as normally distributed weights are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import QuantizationSpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import Quantization


def _build(settings: Mapping[str, Any]) -> Quantization:
    from llmd_plugins.quantization.nf4_linear import Nf4

    return Nf4(settings)


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    return [
        QuantizationSpec(
            name="nf4", summary="4-bit weights at a normal distribution's quantiles, a scale for each 64", build=_build,
            online=True, check=lambda settings: False,
        ),
    ]  # fmt: skip
