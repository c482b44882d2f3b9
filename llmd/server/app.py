"""The HTTP application: what a route sees of the daemon (ServerContext) and how routes and middlewares become one app."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from llmd.config import Config
from llmd.engine.executor import LoadProgress
from llmd.errors import ModelNotFound, NotReady
from llmd.metrics import Metrics
from llmd.server import admin, health, openapi
from llmd.server.auth import ORDER as AUTH_ORDER
from llmd.server.auth import make_auth_middleware
from llmd.server.middleware import add_response_headers, make_outermost_middleware

if TYPE_CHECKING:
    from llmd.plugin.specs import AuthenticatorSpec, MetricsSpec, MiddlewareSpec, RequestSummary, RouteSpec, ServiceSpec
    from llmd.server.generate import ModelService

State = Literal["loading", "ready", "draining", "failed"]
CONTEXT: web.AppKey[ServerContext] = web.AppKey("context")


def _ignore(summary: RequestSummary) -> None:
    """What is done with a summary when the daemon gave nothing to call."""


@dataclass(kw_only=True)
class ServerContext:
    """What routes, middlewares, services and metrics see of the daemon; filled by the daemon, on the loop thread.

    `services` maps every served name to its model and may grow while models load; the first one is the default.
    """

    config: Config
    services: dict[str, ModelService] = field(default_factory=dict)
    routes: Sequence[RouteSpec] = ()
    authenticators: Sequence[AuthenticatorSpec] = ()
    middlewares: Sequence[MiddlewareSpec] = ()
    metric_specs: Sequence[MetricsSpec] = ()
    service_specs: Sequence[ServiceSpec] = ()  # entered when the app starts, left when it stops
    sections: dict[str, Any] = field(default_factory=dict)  # [plugins.<name>], parsed
    request_finished: Callable[[RequestSummary], None] = _ignore
    plugin_status: Callable[[], list[dict[str, Any]]] | None = None  # rows for the admin route
    state: State = "loading"
    progress: LoadProgress = field(default_factory=lambda: LoadProgress("starting", 0.0))
    metrics: Metrics = field(default_factory=Metrics)
    shared: dict[str, Any] = field(default_factory=dict)  # what a plugin's own routes and services share, by its name

    def __post_init__(self) -> None:
        self.metrics.models = self.models

    def settings(self, section: str) -> Any:
        """The parsed `[plugins.<section>]` table."""
        return self.sections[section]

    def models(self) -> list[ModelService]:
        """Every model once, however many names it has."""
        return list({id(service): service for service in self.services.values()}.values())

    def service(self, name: str | None = None) -> ModelService:
        """The model of that name, ready to serve; None means the default. Raises ModelNotFound or NotReady."""
        service = self.services.get(name) if name is not None else next(iter(self.services.values()), None)
        if self.state in ("draining", "failed"):
            raise NotReady(f"the server is {self.state}")
        if service is None:
            if self.state == "loading":
                raise NotReady(f"the server is loading: {self.progress.phase}", retry_after_s=5)
            known = ", ".join(repr(known) for known in self.services)
            raise ModelNotFound(f"model {name!r} is not served; served: {known}", param="model", code="model_not_found")
        if service.state != "ready":
            raise NotReady(f"model {service.names[0]!r} is {service.state}", retry_after_s=5)
        return service


def _ordered_middlewares(context: ServerContext, admin_routes: set[web.AbstractRoute]) -> list[Any]:
    """Outermost first: request id, receipt and errors; then by `order`, authentication among them at 50."""
    layers = [(AUTH_ORDER, make_auth_middleware(context, admin_routes))]
    for spec in context.middlewares:
        if (middleware := spec.build(context.config)) is not None:
            layers.append((spec.order, middleware))
    layers.sort(key=lambda layer: layer[0])
    return [make_outermost_middleware(context), *(middleware for _, middleware in layers)]


def _add_routes(app: web.Application, context: ServerContext, admin_routes: set[web.AbstractRoute]) -> None:
    """Register every route once, and once more under `server.root_path` for proxies that do not strip it."""
    prefix = context.config.server.root_path.rstrip("/")
    for spec in context.routes:
        handler = spec.build(context)
        methods = ("GET", "HEAD") if spec.method == "GET" else (spec.method,)
        for path in dict.fromkeys((spec.path, prefix + spec.path)):
            added = [app.router.add_route(method, path, handler) for method in methods]
            if spec.admin:
                admin_routes.update(added)


async def _run_services(app: web.Application) -> AsyncIterator[None]:
    """Enter what runs beside the server; leave it in the opposite order."""
    context = app[CONTEXT]
    async with AsyncExitStack() as stack:
        for spec in context.service_specs:
            await stack.enter_async_context(spec.build(context))
        yield


def create_app(context: ServerContext) -> web.Application:
    """Build the app: the server's own routes and the plugins' ones, wrapped in the middlewares."""
    context.routes = [*health.routes(), *openapi.routes(), *admin.routes(), *context.routes]
    admin_routes: set[web.AbstractRoute] = set()
    app = web.Application(
        middlewares=_ordered_middlewares(context, admin_routes),
        client_max_size=context.config.server.max_body_bytes,
    )
    app[CONTEXT] = context
    _add_routes(app, context, admin_routes)
    for spec in context.metric_specs:
        spec.build(context.metrics.registry, context)
    app.on_response_prepare.append(add_response_headers)
    app.cleanup_ctx.append(_run_services)
    return app


class ProtocolLog(logging.LoggerAdapter[logging.Logger]):
    """What aiohttp logs of connections: a client that does not speak HTTP is no error of ours."""

    def exception(self, msg: object, *args: object, exc_info: Any = True, **kwargs: Any) -> None:
        """Log an exception; bad HTTP as one line for those who look for it."""
        if isinstance(exc_info, HttpProcessingError):
            self.debug("bad HTTP: %s", exc_info.message)
        else:
            super().exception(msg, *args, exc_info=exc_info, **kwargs)


def make_runner(app: web.Application, **options: Any) -> web.AppRunner:
    """A runner whose handlers are cancelled when their client leaves, with bounded headers and no access log of its own."""
    max_header_bytes = app[CONTEXT].config.server.max_header_bytes
    options.setdefault("keepalive_timeout", 75.0)
    return web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        max_line_size=max_header_bytes,
        max_field_size=max_header_bytes,
        lingering_time=2.0,  # how long the rest of a refused body is read, so that its sender can see the answer
        logger=ProtocolLog(logging.getLogger("llmd.http"), {}),
        **options,
    )
