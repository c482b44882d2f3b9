"""--quantization zeta: 8-bit weights with a scale for each row, made while the checkpoint loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import QuantizationSpec, hookimpl

if TYPE_CHECKING:  # their modules load torch
    from llmd.api.v1 import Quantization


def _build(settings: object) -> Quantization:
    from acme_zeta.linear import Zeta

    return Zeta()


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    return [QuantizationSpec(name="zeta", summary="8-bit weights, a scale a row", build=_build, online=True)]
