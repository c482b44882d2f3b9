"""Decoders that give vectors or scores and no text: Llama, Mistral and the Qwens without a language head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers


def _llama(config: ArchitectureConfig) -> dict[str, bool]:
    return {"qkv_bias": config.attention_bias, "o_bias": config.attention_bias, "qk_norm": False}


def _qwen2(config: ArchitectureConfig) -> dict[str, bool]:
    return {"qkv_bias": True, "o_bias": False, "qk_norm": False}


def _qwen3(config: ArchitectureConfig) -> dict[str, bool]:
    return {**_llama(config), "qk_norm": True}


# family → names of its classes, and what its attention is made of
_FAMILIES: dict[str, tuple[tuple[str, ...], Callable[[ArchitectureConfig], dict[str, bool]]]] = {
    "llama": (("Llama", "Mistral"), _llama),
    "qwen2": (("Qwen2",), _qwen2),
    "qwen3": (("Qwen3",), _qwen3),
}


def _embedder(attention: Callable[[ArchitectureConfig], dict[str, bool]]) -> Callable[..., Any]:
    def build(config: ArchitectureConfig, layers: Layers) -> Any:
        from llmd_plugins.architectures.decoder_heads import DecoderEmbedder

        return DecoderEmbedder(config, layers, **attention(config))

    return build


def _classifier(attention: Callable[[ArchitectureConfig], dict[str, bool]]) -> Callable[..., Any]:
    def build(config: ArchitectureConfig, layers: Layers) -> Any:
        from llmd_plugins.architectures.decoder_heads import DecoderClassifier, DecoderTokenClassifier

        kind = DecoderClassifier if config.classifier_tokens is None else DecoderTokenClassifier
        return kind(config, layers, **attention(config))

    return build


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    specs = []
    for family, (names, attention) in _FAMILIES.items():
        models = tuple(f"{name}Model" for name in names)
        classifiers = tuple(f"{name}ForSequenceClassification" for name in names)
        summary = f"{' and '.join(names)} embedders"
        specs += [
            ArchitectureSpec(name=f"{family}_embedder", summary=summary, architectures=models, build=_embedder(attention)),
            ArchitectureSpec(
                name=f"{family}_classifier",
                summary=summary.replace("embedders", "classifiers and cross-encoders"),
                architectures=classifiers,
                build=_classifier(attention),
            ),
        ]
    return specs
