"""Vectors, classes and scores: OpenAI's embeddings, vLLM's pooling, classify and score, Jina's and Cohere's rerank."""

from __future__ import annotations

from typing import Any

from llmd.api.v1 import RouteSpec, hookimpl


def _handler(module: str, name: str) -> Any:
    def build(context: Any) -> Any:
        from importlib import import_module

        return getattr(import_module(f"llmd_plugins.pooling.{module}"), name)(context)

    return build


def _operation(name: str) -> Any:
    def build() -> Any:
        from llmd_plugins.pooling import operations

        return getattr(operations, name)()

    return build


# path, what it does, and where its handler and its operation are
_ROUTES = (
    ("/v1/embeddings", "vectors of texts", "vectors", "embeddings"),
    ("/pooling", "whatever the model makes of texts: vectors, vectors of tokens, scores", "vectors", "pooling"),
    ("/classify", "labels of texts", "vectors", "classify"),
    ("/score", "how well two texts go together", "scores", "score"),
    ("/v1/score", "how well two texts go together", "scores", "score"),
    ("/rerank", "documents in the order in which they answer a query", "scores", "rerank"),
    ("/v1/rerank", "documents in the order in which they answer a query", "scores", "rerank"),
    ("/v2/rerank", "documents in the order in which they answer a query", "scores", "rerank_v2"),
)


@hookimpl
def llmd_register_routes() -> list[RouteSpec]:
    """The routes, with vLLM's places and names."""
    return [
        RouteSpec(
            name=f"pooling{path.replace('/', '.')}",
            summary=summary,
            method="POST",
            path=path,
            build=_handler(module, name),
            openapi=_operation(name),
        )
        for path, summary, module, name in _ROUTES
    ]
