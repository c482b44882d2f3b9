"""Mixtures of experts: Mixtral, Qwen2-MoE and Qwen3-MoE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmd.api.v1 import ArchitectureConfig, Layers


def _mixtral(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.decoder import CausalLM
    from llmd_plugins.architectures.mixtures import MixtralLayers

    return CausalLM(config, layers, qkv_bias=False, o_bias=False, mixed=MixtralLayers(config, layers))


def _qwen2(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.decoder import CausalLM
    from llmd_plugins.architectures.mixtures import QwenLayers

    has_bias = bool(config.raw.get("qkv_bias", True))
    return CausalLM(config, layers, qkv_bias=has_bias, o_bias=False, mixed=QwenLayers(config, layers, is_shared=True))


def _qwen3(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.decoder import CausalLM
    from llmd_plugins.architectures.mixtures import QwenLayers

    has_bias, mixed = config.attention_bias, QwenLayers(config, layers, is_shared=False)
    return CausalLM(config, layers, qkv_bias=has_bias, o_bias=has_bias, qk_norm=True, mixed=mixed)


def _spell_sizes(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model whose layers are all mixtures need not say how large an MLP would be."""
    return {"intermediate_size": raw.get("moe_intermediate_size"), **raw}


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    return [
        ArchitectureSpec(name="mixtral", summary="Mixtral", architectures=("MixtralForCausalLM",), build=_mixtral),
        ArchitectureSpec(
            name="qwen2_moe",
            summary="Qwen 1.5 and 2 with experts, one of them shared",
            architectures=("Qwen2MoeForCausalLM",),
            build=_qwen2,
            spell=_spell_sizes,
        ),
        ArchitectureSpec(
            name="qwen3_moe",
            summary="Qwen3 with experts",
            architectures=("Qwen3MoeForCausalLM",),
            build=_qwen3,
            spell=_spell_sizes,
        ),
    ]
