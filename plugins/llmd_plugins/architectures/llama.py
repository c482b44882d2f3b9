"""Llama (1 to 3.x) and Mistral."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers


def _build(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.decoder import CausalLM

    return CausalLM(config, layers, qkv_bias=config.attention_bias, o_bias=config.attention_bias)


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    return [
        ArchitectureSpec(
            name="llama",
            summary="Llama 1 to 3.x and Mistral, sliding window included",
            architectures=("LlamaForCausalLM", "MistralForCausalLM"),
            build=_build,
        )
    ]
