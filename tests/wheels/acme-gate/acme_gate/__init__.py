"""Signed tickets instead of keys (`ticket <name> <hmac>`), and GET /acme/whoami, which tells a client who it is."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from llmd.api.v1 import AuthenticatorSpec, RouteSpec, hookimpl

if TYPE_CHECKING:
    from aiohttp import web

    from llmd.api.v1 import Authenticator, Config, Principal, ServerContext


def sign(secret: str, name: str) -> str:
    """The signature of a ticket."""
    return hmac.new(secret.encode(), name.encode(), hashlib.sha256).hexdigest()


class Gate:
    """Believes who brings a name with its signature."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    async def authenticate(self, headers: Mapping[str, str], peer: str | None) -> Principal | None:
        from llmd.api.v1 import Principal

        match headers.get("Authorization", "").split(" "):
            case ["ticket", name, signature] if name and signature.isascii():
                good = hmac.compare_digest(sign(self._secret, name), signature)
                return Principal(key=f"ticket-of-{name}") if good else None
        return None


def _build_gate(config: Config) -> Authenticator | None:
    secret = os.environ.get("ACME_GATE_SECRET")
    return Gate(secret) if secret else None


def _build_whoami(context: ServerContext) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    from llmd.api.v1 import json_response, receipt_of

    async def whoami(request: web.Request) -> web.StreamResponse:
        return json_response({"key": receipt_of(request).key})

    return whoami


@hookimpl
def llmd_register_authenticators() -> list[AuthenticatorSpec]:
    return [AuthenticatorSpec(name="acme_gate", summary="signed tickets", build=_build_gate)]


@hookimpl
def llmd_register_routes() -> list[RouteSpec]:
    summary = "Who the client is"
    return [RouteSpec(name="acme.whoami", summary=summary, method="GET", path="/acme/whoami", build=_build_whoami)]
