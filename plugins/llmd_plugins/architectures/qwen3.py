"""Qwen3 (dense): Llama with a norm on each query and key head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers


def _build(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.decoder import CausalLM

    return CausalLM(config, layers, qkv_bias=config.attention_bias, o_bias=config.attention_bias, qk_norm=True)


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    return [ArchitectureSpec(name="qwen3", summary="Qwen3, dense sizes", architectures=("Qwen3ForCausalLM",), build=_build)]
