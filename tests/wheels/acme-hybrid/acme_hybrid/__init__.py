"""A decoder in which two layers of three keep a state of their own in place of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers


def _build(config: ArchitectureConfig, layers: Layers) -> Any:
    from acme_hybrid.model import AcmeHybridForCausalLM

    return AcmeHybridForCausalLM(config, layers)


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    names = ("AcmeHybridForCausalLM",)
    summary = "gated linear recurrences between layers of attention"
    return [ArchitectureSpec(name="acme_hybrid", summary=summary, architectures=names, build=_build, has_state=True)]
