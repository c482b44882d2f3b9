"""POST /zeta/reverse: {"text": …} → {"text": …}, the other way round."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import RouteSpec, hookimpl

if TYPE_CHECKING:
    from aiohttp import web

    from llmd.api.v1 import ServerContext


def _build(context: ServerContext) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    from acme_zeta.handler import reverse

    return reverse


def _openapi() -> Mapping[str, Any]:
    return {"summary": "Reverse a text", "responses": {"200": {"description": "The text, reversed"}}}


@hookimpl
def llmd_register_routes() -> list[RouteSpec]:
    summary = "Reverse a text"
    return [RouteSpec(name="zeta", summary=summary, method="POST", path="/zeta/reverse", build=_build, openapi=_openapi)]
