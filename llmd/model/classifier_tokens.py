"""Language models that score by the logits of words: Qwen3-Reranker's "no" and "yes" behind an instruction.

config.json, or what is set over it   classifier_from_token: ["no", "yes"], and is_original_qwen3_reranker: true or
                                      method: "from_2_way_softmax" for one score of the two, as vLLM names it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmd.errors import ModelError

_TWO_WAY, _EACH = "from_2_way_softmax", "no_post_processing"


class ClassifierTokens(NamedTuple):
    """The tokens whose logits are the scores; of two compared there is one score, how much likelier the second is."""

    token_ids: tuple[int, ...]
    labels: tuple[str, ...]
    compares: bool


def read_classifier_tokens(raw: Mapping[str, Any], folder: Path) -> ClassifierTokens | None:
    """What config.json asks for, its tokens found in tokenizer.json. Raises ModelError."""
    tokens = raw.get("classifier_from_token")
    if tokens is None:
        return None
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ModelError(f"config.json: classifier_from_token must be a list of tokens, got {tokens!r}")
    method = raw.get("method") or (_TWO_WAY if raw.get("is_original_qwen3_reranker") is True else _EACH)
    if method not in (_TWO_WAY, _EACH):
        raise ModelError(f"config.json: method must be {_TWO_WAY!r} or {_EACH!r}, got {method!r}")
    compares = method == _TWO_WAY
    if compares and len(tokens) != 2:
        raise ModelError(f"config.json: classifier_from_token must be two tokens for {_TWO_WAY!r}, got {tokens!r}")
    vocab = _read_vocab(folder)
    if unknown := [token for token in tokens if token not in vocab]:
        raise ModelError(f"config.json: classifier_from_token: {unknown[0]!r} is no token of tokenizer.json")
    return ClassifierTokens(tuple(vocab[token] for token in tokens), (tokens[1],) if compares else tuple(tokens), compares)


def _read_vocab(folder: Path) -> dict[str, int]:
    """Token ids by token; "▁" before a word is not looked for."""
    try:
        document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = document["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: [token, score] in the order of the ids
            vocab = {entry[0]: token_id for token_id, entry in enumerate(vocab)}
        return {**vocab, **{token["content"]: token["id"] for token in document.get("added_tokens") or ()}}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(
            f"{folder.name}/tokenizer.json cannot be read ({type(error).__name__}), and classifier_from_token needs it"
        ) from error
