"""GET /v1/models and /v1/models/{model}."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd.api.v1 import ModelNotFound, json_response

if TYPE_CHECKING:
    from llmd.api.v1 import AdapterInfo, ModelService, ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _card(name: str, service: ModelService) -> dict[str, Any]:
    is_ready = service.state == "ready"
    return {
        "id": name,
        "object": "model",
        "created": int(service.created_s),
        "owned_by": "llmd",
        "root": service.names[0],
        "parent": None,
        "max_model_len": service.max_model_len if is_ready else None,
    }


def _adapter_card(adapter: AdapterInfo, service: ModelService) -> dict[str, Any]:
    """An adapter is a model whose parent is the one that it changes."""
    return _card(adapter.name, service) | {"root": adapter.path, "parent": service.names[0]}


def _cards(context: ServerContext) -> Iterator[dict[str, Any]]:
    served = context.allowed()
    yield from (_card(name, service) for name, service in served.items())
    for service in {id(service): service for service in served.values()}.values():
        yield from (_adapter_card(adapter, service) for adapter in context.adapters(service))


def list_models(context: ServerContext) -> Handler:
    """The handler: one card a name, those of adapters at the end."""

    async def handle(request: web.Request) -> web.StreamResponse:
        cards = list(_cards(context))
        return json_response({"object": "list", "data": cards})

    return handle


def show_model(context: ServerContext) -> Handler:
    """The handler."""

    async def handle(request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        card = next((card for card in _cards(context) if card["id"] == name), None)
        if card is None:
            brief = name[:128]
            raise ModelNotFound(f"model {brief!r} is not served", param="model", code="model_not_found")
        return json_response(card)

    return handle
