"""OpenAI's responses: answers as items, kept for a while so that the next request can go on from them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from llmd.api.v1 import ConfigSectionSpec, RouteSpec, Section, hookimpl


class ResponsesSettings(Section):
    """`[plugins.responses]`."""

    max_stored: int = Field(1000, ge=0, description="responses kept in memory for GET and previous_response_id; 0: none")
    max_stored_bytes: int = Field(64 << 20, ge=0, description="bytes that the kept responses may take")
    max_background: int = Field(64, ge=0, description="responses generated in the background at once")


def _route(name: str) -> Any:
    def build(context: Any) -> Any:
        from llmd_plugins.responses import routes

        return getattr(routes, name)(context)

    return build


def _operation(name: str) -> Any:
    def build() -> Any:
        from llmd_plugins.responses import operations

        return getattr(operations, name)()

    return build


@hookimpl
def llmd_register_config_sections() -> list[ConfigSectionSpec]:
    """What an operator may set."""
    return [ConfigSectionSpec(name="responses", summary="the responses API", model=ResponsesSettings)]


@hookimpl
def llmd_register_routes() -> list[RouteSpec]:
    """The routes."""
    rows = (
        ("create", "answer with items, streamed or not", "POST", ""),
        ("count_tokens", "count the tokens of a conversation", "POST", "/input_tokens"),
        ("retrieve", "show a stored response", "GET", "/{response_id}"),
        ("delete", "forget a stored response", "DELETE", "/{response_id}"),
        ("cancel", "stop a response in the background", "POST", "/{response_id}/cancel"),
        ("input_items", "list the input of a stored response", "GET", "/{response_id}/input_items"),
    )
    return [
        RouteSpec(
            name=f"responses.{name}", summary=summary, method=method, path=f"/v1/responses{path}",
            build=_route(name), openapi=_operation(name),
        )
        for name, summary, method, path in rows
    ]  # fmt: skip
