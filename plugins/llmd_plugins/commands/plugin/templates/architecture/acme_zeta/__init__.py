"""The architecture "ZetaForCausalLM" of config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers


def _build(config: ArchitectureConfig, layers: Layers) -> Any:
    from acme_zeta.model import ZetaForCausalLM

    return ZetaForCausalLM(config, layers)


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    return [ArchitectureSpec(name="zeta", summary="a pre-norm decoder", architectures=("ZetaForCausalLM",), build=_build)]
