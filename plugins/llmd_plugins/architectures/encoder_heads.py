"""Classifiers over BERT and RoBERTa: what they make of the first token's hidden state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from llmd_plugins.architectures.encoder import EncoderModel, number

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Layers


class BertClassifier(EncoderModel):
    """classifier(tanh(pooler(first token)))."""

    ignored_weights = ("*position_ids",)

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__(config, layers, "bert")
        dense = layers.linear(config.hidden_size, config.hidden_size, bias=True)
        self.encoder.add_module("pooler", nn.ModuleDict({"dense": dense}))
        self.dtype = layers.dtype
        self.classifier = layers.linear(config.hidden_size, len(config.labels), bias=True)

    def classify(self, vectors: Tensor) -> Tensor:
        """[N, hidden_size] → [N, num_labels]."""
        pooled = self.encoder.get_submodule("pooler.dense")(vectors.to(self.dtype))
        return self.classifier(pooled.tanh())


class RobertaClassifier(EncoderModel):
    """out_proj(tanh(dense(first token)))."""

    ignored_weights = ("*position_ids", "*pooler.dense.*")

    def __init__(self, config: ArchitectureConfig, layers: Layers) -> None:
        super().__init__(config, layers, "roberta", offset=int(number(config, "pad_token_id", 1)) + 1)
        self.classifier = nn.ModuleDict(
            {
                "dense": layers.linear(config.hidden_size, config.hidden_size, bias=True),
                "out_proj": layers.linear(config.hidden_size, len(config.labels), bias=True),
            }
        )
        self.dtype = layers.dtype

    def classify(self, vectors: Tensor) -> Tensor:
        """[N, hidden_size] → [N, num_labels]."""
        return self.classifier["out_proj"](self.classifier["dense"](vectors.to(self.dtype)).tanh())
