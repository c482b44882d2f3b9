"""Who asks: every route wants a key unless the config opens it; admin routes want an admin key. Fails closed."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from llmd.server.errors import RequestRefused
from llmd.server.middleware import receipt_of

if TYPE_CHECKING:
    from llmd.server.app import ServerContext

logger = logging.getLogger("llmd.auth")

ORDER = 50  # CORS lies outside (a preflight brings no key), what counts per key lies inside
_MAX_KEY_BYTES = 4096

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who was recognised. `key` names the key without telling it; fairness and usage are counted by it."""

    key: str
    is_admin: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


class Authenticator(Protocol):
    """Says who sent a request; None: not someone this authenticator knows."""

    async def authenticate(self, headers: Mapping[str, str], peer: str | None) -> Principal | None: ...


ANONYMOUS = Principal(key="")


def bearer_token(headers: Mapping[str, str]) -> str | None:
    """The key of `Authorization: Bearer …`, or of `x-api-key`."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")[:_MAX_KEY_BYTES]).digest()


class KeySet:
    """A set of secret keys, kept as digests; looking one up takes the same time whichever it is."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, key: str | None) -> str | None:
        """A name for the key that tells nothing of it, or None when it is not in the set."""
        if key is None or len(key) > _MAX_KEY_BYTES:
            return None
        digest = _digest(key)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return f"key-{digest.hex()[:12]}" if found else None


def _unauthorized(headers: Mapping[str, str]) -> RequestRefused:
    given = bearer_token(headers) is not None
    message = "the API key is not known" if given else "an API key is needed: send 'Authorization: Bearer KEY'"
    return RequestRefused(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class Gate:
    """Decides for each request, in this order: open route, admin key, authenticators."""

    def __init__(self, context: ServerContext, admin_routes: Set[web.AbstractRoute]) -> None:
        self._admin_routes = admin_routes
        self._prefix = context.config.server.root_path.rstrip("/")
        self._admin_keys = KeySet(context.config.server.admin_keys)
        self._open = frozenset(context.config.server.open_routes)
        specs = sorted(context.authenticators, key=lambda spec: spec.order)
        built = [(spec.name, spec.build(context.config)) for spec in specs]
        self._authenticators = [(name, authenticator) for name, authenticator in built if authenticator is not None]

    async def check(self, request: web.Request) -> Principal:
        """The principal of a request that may go on; raises RequestRefused (401, 403) for one that may not."""
        route = request.match_info.route
        if route in self._admin_routes:
            return await self._admin(request)
        path = route.resource.canonical if route.resource is not None else request.path
        if path in self._open or path.removeprefix(self._prefix) in self._open:
            return ANONYMOUS
        return await self._user(request)

    async def _admin(self, request: web.Request) -> Principal:
        if name := self._admin_keys.find(bearer_token(request.headers)):
            return Principal(key=name, is_admin=True)
        principal = await self._ask(request)
        if principal is not None and principal.is_admin:
            return principal
        if not self._admin_keys:
            raise RequestRefused(403, "admin routes are off: no server.admin_keys are configured", code="admin_disabled")
        if principal is not None:
            raise RequestRefused(403, "this route needs an admin key", code="admin_key_needed")
        raise _unauthorized(request.headers)

    async def _user(self, request: web.Request) -> Principal:
        if not self._authenticators:
            return ANONYMOUS
        if (principal := await self._ask(request)) is not None:
            return principal
        if name := self._admin_keys.find(bearer_token(request.headers)):
            return Principal(key=name, is_admin=True)
        raise _unauthorized(request.headers)

    async def _ask(self, request: web.Request) -> Principal | None:
        """The first authenticator that knows the sender; one that breaks lets nobody in."""
        for name, authenticator in self._authenticators:
            try:
                principal = await authenticator.authenticate(request.headers, request.remote)
            except Exception:  # whatever a plugin raised, the door stays shut
                logger.exception("authenticator %s failed, the request is refused", name)
                message = "the request cannot be authenticated now"
                raise RequestRefused(503, message, type="server_error", code="authentication_failed") from None
            if principal is not None:
                return principal
        return None


def make_auth_middleware(
    context: ServerContext, admin_routes: Set[web.AbstractRoute]
) -> Callable[..., Awaitable[web.StreamResponse]]:
    """The middleware that opens or shuts every route; `admin_routes` may be filled later."""
    gate = Gate(context, admin_routes)

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        principal = await gate.check(request)
        receipt = receipt_of(request)
        receipt.principal, receipt.key = principal, principal.key
        return await handler(request)

    return authenticate
