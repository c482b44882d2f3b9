"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers


def _build(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.decoder import CausalLM

    return CausalLM(config, layers, qkv_bias=True, o_bias=False)


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    return [ArchitectureSpec(name="qwen2", summary="Qwen2 and Qwen2.5", architectures=("Qwen2ForCausalLM",), build=_build)]
