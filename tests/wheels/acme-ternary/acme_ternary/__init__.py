"""--quantization ternary: every weight is -1, 0 or 1 times its row's scale, four of them in a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import QuantizationSpec, hookimpl

if TYPE_CHECKING:  # their modules load torch
    from llmd.api.v1 import Quantization


def _build(settings: object) -> Quantization:
    from acme_ternary.linear import Ternary

    return Ternary()


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    return [QuantizationSpec(name="ternary", summary="2 bits a weight, made while loading", build=_build, online=True)]
