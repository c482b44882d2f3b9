"""RoBERTa and XLM-RoBERTa: BERT whose positions begin behind the padding token's id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ArchitectureSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers

_MODELS = ("RobertaModel", "RobertaForMaskedLM", "XLMRobertaModel", "XLMRobertaForMaskedLM", "CamembertModel")
_CLASSIFIERS = (
    "RobertaForSequenceClassification", "XLMRobertaForSequenceClassification", "CamembertForSequenceClassification",
)  # fmt: skip


def _build(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.encoder import EncoderModel, number

    return EncoderModel(config, layers, "roberta", offset=int(number(config, "pad_token_id", 1)) + 1)


def _build_classifier(config: ArchitectureConfig, layers: Layers) -> Any:
    from llmd_plugins.architectures.encoder_heads import RobertaClassifier

    return RobertaClassifier(config, layers)


@hookimpl
def llmd_register_architectures() -> list[ArchitectureSpec]:
    return [
        ArchitectureSpec(
            name="roberta", summary="RoBERTa and XLM-RoBERTa encoders", architectures=_MODELS, build=_build,
            is_encoder=True,
        ),
        ArchitectureSpec(
            name="roberta_classifier", summary="RoBERTa and XLM-RoBERTa classifiers and cross-encoders",
            architectures=_CLASSIFIERS, build=_build_classifier, is_encoder=True,
        ),
    ]  # fmt: skip
