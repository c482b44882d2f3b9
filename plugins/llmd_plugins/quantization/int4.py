"""4-bit weights, quantized while a 16- or 32-bit checkpoint loads: a quarter of the bytes a decode step reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import QuantizationSpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import Quantization


def _build(settings: Mapping[str, Any]) -> Quantization:
    from llmd_plugins.quantization.int4_linear import Int4

    return Int4(settings)


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    return [
        QuantizationSpec(
            name="int4",
            summary="4-bit weights with a scale for each 32",
            build=_build,
            online=True,
            check=lambda settings: False,
        ),
    ]
