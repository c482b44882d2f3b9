"""Anthropic's API: messages and the counting of their tokens."""

from __future__ import annotations

from typing import Any

from llmd.api.v1 import MiddlewareSpec, RouteSpec, hookimpl


def _route(name: str) -> Any:
    def build(context: Any) -> Any:
        from llmd_plugins.anthropic import routes

        return getattr(routes, name)(context)

    return build


def _operation(name: str) -> Any:
    def build() -> Any:
        from llmd_plugins.anthropic import operations

        return getattr(operations, name)()

    return build


def _error_shape(config: Any) -> Any:
    from llmd_plugins.anthropic.errors import error_shape

    return error_shape(config)


@hookimpl
def llmd_register_middlewares() -> list[MiddlewareSpec]:
    """Errors in Anthropic's shape: just outside the key check, whose refusals it rewords too."""
    return [
        MiddlewareSpec(
            name="anthropic.errors", summary="errors of /v1/messages in Anthropic's shape", order=49, build=_error_shape
        )
    ]


@hookimpl
def llmd_register_routes() -> list[RouteSpec]:
    """The routes."""
    return [
        RouteSpec(
            name="anthropic.messages", summary="answer a conversation in Anthropic's format", method="POST",
            path="/v1/messages", build=_route("messages"), openapi=_operation("messages"),
        ),
        RouteSpec(
            name="anthropic.count_tokens", summary="count the tokens of a conversation in Anthropic's format", method="POST",
            path="/v1/messages/count_tokens", build=_route("count_tokens"), openapi=_operation("count_tokens"),
        ),
    ]  # fmt: skip
