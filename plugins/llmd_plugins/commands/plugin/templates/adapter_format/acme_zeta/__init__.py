"""Adapters in folders that hold `zeta.json` and `zeta.safetensors`."""

from llmd.api.v1 import AdapterFormat, AdapterFormatSpec, hookimpl


def _build() -> AdapterFormat:
    from acme_zeta.files import ZetaFormat

    return ZetaFormat()


@hookimpl
def llmd_register_adapter_formats() -> list[AdapterFormatSpec]:
    return [AdapterFormatSpec(name="zeta", summary="low-rank pairs, <module>.a and <module>.b", build=_build)]
