"""Llama (1 to 3.x) and Mistral."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import ArchitectureConfig, Layers


def _build(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.decoder import CausalLM

    return CausalLM(config, layers, qkv_bias=config.attention_bias, o_bias=config.attention_bias)


def _spell(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Llama has no sliding window, whatever its config.json may have kept of a Mistral's."""
    names = raw.get("architectures") or ()
    return {**raw, "sliding_window": None} if "LlamaForCausalLM" in names else raw


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    return [
        ArchitectureSpec(
            name="llama",
            summary="Llama 1 to 3.x, and Mistral with its sliding window",
            architectures=("LlamaForCausalLM", "MistralForCausalLM"),
            build=_build,
            spell=_spell,
        )
    ]
