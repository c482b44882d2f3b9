"""A decoder without its language head: the last token's hidden state is the vector, or goes to a head of scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from llmd_plugins.architectures.decoder import Decoder

if TYPE_CHECKING:
    from llmd.api.v1 import ArchitectureConfig, Batch, Layers


class DecoderEmbedder(nn.Module):
    """Hidden states for vectors."""

    pooling = "last"
    ignored_weights: tuple[str, ...] = ("*rotary_emb.inv_freq", "lm_head.*")

    def __init__(self, config: ArchitectureConfig, layers: Layers, **attention: bool) -> None:
        super().__init__()
        self.model = Decoder(config, layers, None, **attention)

    def forward(self, batch: Batch) -> Tensor:
        """[T, hidden_size], normalised."""
        return self.model(batch)


class DecoderClassifier(DecoderEmbedder):
    """score(last token)."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, **attention: bool) -> None:
        super().__init__(config, layers, **attention)
        self.score = layers.linear(config.hidden_size, len(config.labels))
        self.dtype = layers.dtype

    def classify(self, vectors: Tensor) -> Tensor:
        """[N, hidden_size] → [N, num_labels]."""
        return self.score(vectors.to(self.dtype))


class DecoderTokenClassifier(DecoderEmbedder):
    """Logits of chosen tokens behind the last one: each a score, or how much likelier the second is than the first."""

    def __init__(self, config: ArchitectureConfig, layers: Layers, **attention: bool) -> None:
        super().__init__(config, layers, **attention)
        assert config.classifier_tokens is not None
        self.tokens = config.classifier_tokens
        self.lm_head = layers.lm_head(self.model.embed_tokens)
        self.dtype = layers.dtype
        self.ignored_weights = ("*rotary_emb.inv_freq", *(["lm_head.weight"] if config.tie_word_embeddings else []))

    def classify(self, vectors: Tensor) -> Tensor:
        """[N, hidden_size] → [N, num_labels]."""
        logits = self.lm_head(vectors.to(self.dtype))[:, list(self.tokens.token_ids)]
        return logits[:, 1:] - logits[:, :1] if self.tokens.compares else logits
