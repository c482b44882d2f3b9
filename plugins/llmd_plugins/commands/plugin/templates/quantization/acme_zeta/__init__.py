"""--quantization zeta: 8-bit weights with a scale for each row, made while the checkpoint loads."""

from llmd.api.v1 import Quantization, QuantizationSpec, hookimpl


def _build(settings: object) -> Quantization:
    from acme_zeta.linear import Zeta

    return Zeta()


@hookimpl
def llmd_register_quantizations() -> list[QuantizationSpec]:
    return [QuantizationSpec(name="zeta", summary="8-bit weights, a scale a row", build=_build, online=True)]
