"""ModernBERT: embeddings, and classifiers (cross-encoders among them)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers


def _build(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.modernbert_layers import ModernBert

    return ModernBert(config, layers)


def _build_classifier(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.modernbert_layers import ModernBertClassifier

    return ModernBertClassifier(config, layers)


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    return [
        ArchitectureSpec(
            name="modernbert", summary="ModernBERT encoders, local and global attention",
            architectures=("ModernBertModel", "ModernBertForMaskedLM"), build=_build, is_encoder=True,
        ),
        ArchitectureSpec(
            name="modernbert_classifier", summary="ModernBERT classifiers and cross-encoders",
            architectures=("ModernBertForSequenceClassification",), build=_build_classifier, is_encoder=True,
        ),
    ]  # fmt: skip
