"""A decoder whose attention and MLP read the same norm, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers


def _build(config: ArchitectureConfig, layers: Layers) -> Any:
    from acme_parallel.model import AcmeParallelForCausalLM

    return AcmeParallelForCausalLM(config, layers)


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    names = ("AcmeParallelForCausalLM",)
    return [ArchitectureSpec(name="acme_parallel", summary="attention beside MLP", architectures=names, build=_build)]
