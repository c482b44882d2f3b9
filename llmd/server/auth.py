"""Who asks: every route wants a key unless the config opens it; admin routes want an admin key. Fails closed."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from llmd.server.deadlines import limit_time, read_timeout
from llmd.server.errors import RequestRefused
from llmd.server.middleware import receipt_of
from llmd.server.quotas import current_key

if TYPE_CHECKING:
    from llmd.config import Config
    from llmd.server.app import ServerContext

logger = logging.getLogger("llmd.auth")

ORDER = 50  # CORS lies outside (a preflight brings no key), what counts per key lies inside
_MAX_KEY_BYTES = 4096
_COUNTED = ("POST",)  # looking at the list of models is no request that a key's limits mean

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


def key_digest(key: str) -> bytes:
    """SHA-256 of a key: all that is kept of it, and what `[[keys]]` hold as `hash`."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")[:_MAX_KEY_BYTES]).digest()


class KeySet:
    """A set of secret keys, kept as digests; looking one up takes the same time whichever it is.

    Keys are random, so a plain digest is as hard to invert as they are to guess. `named` are digests and their names.
    """

    def __init__(self, keys: Iterable[str], named: Mapping[bytes, str] | None = None) -> None:
        digests = [key_digest(key) for key in keys]
        self._names = {**{digest: f"key-{digest.hex()[:12]}" for digest in digests}, **(named or {})}

    def __len__(self) -> int:
        return len(self._names)

    def find(self, key: str | None) -> str | None:
        """A name for the key that tells nothing of it, or None when it is not in the set."""
        if key is None or len(key) > _MAX_KEY_BYTES:
            return None
        digest, found = key_digest(key), None
        for known, name in self._names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


def _unauthorized(headers: Mapping[str, str]) -> RequestRefused:
    given = bearer_token(headers) is not None
    message = (
        "Incorrect API key provided: it is not known here"
        if given
        else "an API key is needed: send 'Authorization: Bearer KEY'"
    )
    return RequestRefused(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class Gate:
    """Decides for each request, in this order: open route, admin key, authenticators."""

    def __init__(self, context: ServerContext, admin_routes: Set[web.AbstractRoute]) -> None:
        self._context = context
        self._admin_routes = admin_routes
        self._prefix = context.config.server.root_path.rstrip("/")
        self._read(context.config)
        specs = sorted(context.authenticators, key=lambda spec: spec.order)
        built = [(spec.name, spec.build(context.config)) for spec in specs]
        self._authenticators = [(name, authenticator) for name, authenticator in built if authenticator is not None]

    def _read(self, config: Config) -> None:
        self._config = config
        self._admin_keys = KeySet(config.server.admin_keys)
        self._open = frozenset(config.server.open_routes)

    async def check(self, request: web.Request) -> Principal:
        """The principal of a request that may go on; raises RequestRefused (401, 403) for one that may not."""
        if self._config is not self._context.config:  # it was reloaded
            self._read(self._context.config)
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
        current_key.set(principal.key)
        limit_time(read_timeout(request.headers))
        if request.method not in _COUNTED:
            return await handler(request)
        with context.quotas.enter(principal.key) as headers:
            receipt.headers.update(headers)
            return await handler(request)

    return authenticate
