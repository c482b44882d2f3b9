"""Attention backend "zeta": `attention_backend = "zeta"`, or chosen by itself when its priority is the highest usable."""

from llmd.api.v1 import AttentionBackend, AttentionBackendSpec, hookimpl


def _build() -> AttentionBackend:
    from acme_zeta.backend import Zeta

    return Zeta()


@hookimpl
def llmd_register_attention_backends() -> list[AttentionBackendSpec]:
    return [AttentionBackendSpec(name="zeta", summary="torch's SDPA, row by row", build=_build, priority=-10)]
