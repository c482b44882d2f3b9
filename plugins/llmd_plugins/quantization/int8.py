"""8-bit weights, quantized while a 16- or 32-bit checkpoint loads: half the bytes a decode step reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import QuantizationSpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import Quantization


def _build(settings: Mapping[str, Any]) -> Quantization:
    from llmd_plugins.quantization.int8_linear import Int8

    return Int8(settings)


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    return [
        QuantizationSpec(
            name="int8",
            summary="8-bit weights a channel, 8-bit activations a token",
            build=_build,
            online=True,
            check=lambda settings: False,
        )
    ]
