"""BERT: embeddings, and classifiers (cross-encoders among them)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers


def _build(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.encoder import EncoderModel

    return EncoderModel(config, layers, "bert")


def _build_classifier(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.encoder_heads import BertClassifier

    return BertClassifier(config, layers)


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    return [
        ArchitectureSpec(
            name="bert", summary="BERT encoders", architectures=("BertModel", "BertForMaskedLM"), build=_build,
            is_encoder=True,
        ),
        ArchitectureSpec(
            name="bert_classifier", summary="BERT classifiers and cross-encoders",
            architectures=("BertForSequenceClassification",), build=_build_classifier, is_encoder=True,
        ),
    ]  # fmt: skip
