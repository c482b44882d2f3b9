"""The operations of /openapi.json, from the models that validate the requests."""

from __future__ import annotations

from typing import Any

from llmd.api.v1 import json_operation
from llmd_plugins.pooling.protocol import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)

_TAG = "pooling"
_NUMBERS = {"type": "array", "items": {"type": "number"}}
_VECTOR = {"anyOf": [_NUMBERS, {"type": "string", "contentEncoding": "base64"}]}
_MATRIX = {"anyOf": [_NUMBERS, {"type": "array", "items": _NUMBERS}, {"type": "string", "contentEncoding": "base64"}]}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _answer(**properties: Any) -> dict[str, Any]:
    integer = {"type": "integer"}
    return _object(
        id={"type": "string"},
        object={"const": "list"},
        created=integer,
        model={"type": "string"},
        **properties,
        usage=_object(prompt_tokens=integer, total_tokens=integer),
    )


def _list(**properties: Any) -> dict[str, Any]:
    return _answer(data={"type": "array", "items": _object(index={"type": "integer"}, **properties)})


def embeddings() -> dict[str, Any]:
    """POST /v1/embeddings."""
    answer = _list(object={"const": "embedding"}, embedding=_VECTOR)
    return json_operation("Vectors of texts", EmbeddingRequest, answer, tag=_TAG)


def pooling() -> dict[str, Any]:
    """POST /pooling."""
    answer = _list(object={"const": "pooling"}, data=_MATRIX)
    return json_operation("Vectors, vectors of tokens, or scores of texts", PoolingRequest, answer, tag=_TAG)


def classify() -> dict[str, Any]:
    """POST /classify."""
    answer = _list(label={"type": "string"}, probs=_NUMBERS, num_classes={"type": "integer"})
    return json_operation("Labels of texts", ClassifyRequest, answer, tag=_TAG)


def score() -> dict[str, Any]:
    """POST /score and /v1/score."""
    answer = _list(object={"const": "score"}, score={"type": "number"})
    return json_operation("How well two texts go together", ScoreRequest, answer, tag=_TAG)


def rerank() -> dict[str, Any]:
    """POST /rerank and /v1/rerank."""
    result = _object(index={"type": "integer"}, relevance_score={"type": "number"})
    result["properties"]["document"] = _object(text={"type": "string"})
    answer = _answer(results={"type": "array", "items": result}, meta={"type": "object"})
    return json_operation("Order documents by a query", RerankRequest, answer, tag=_TAG)


def rerank_v2() -> dict[str, Any]:
    """POST /v2/rerank."""
    return rerank()
