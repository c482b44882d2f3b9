"""GET /v1/models and /v1/models/{model}."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd.api.v1 import ModelNotFound, json_response

if TYPE_CHECKING:
    from llmd.api.v1 import ModelService, ServerContext

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


def list_models(context: ServerContext) -> Handler:
    """The handler: one card a name."""

    async def handle(request: web.Request) -> web.StreamResponse:
        cards = [_card(name, service) for name, service in context.services.items()]
        return json_response({"object": "list", "data": cards})

    return handle


def show_model(context: ServerContext) -> Handler:
    """The handler."""

    async def handle(request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        service = context.services.get(name)
        if service is None:
            brief = name[:128]
            raise ModelNotFound(f"model {brief!r} is not served", param="model", code="model_not_found")
        return json_response(_card(name, service))

    return handle
