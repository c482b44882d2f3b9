"""The HTTP application: what a route sees of the daemon (ServerContext) and how routes and middlewares become one app."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
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
from llmd.server.middleware import Receipt, add_response_headers, make_outermost_middleware
from llmd.server.protocol import Runner
from llmd.server.quotas import Quotas, current_key
from llmd.server.receipts import RequestLog

if TYPE_CHECKING:
    from llmd.engine.adapter_slots import AdapterInfo
    from llmd.plugin.specs import AuthenticatorSpec, MetricsSpec, MiddlewareSpec, RequestSummary, RouteSpec, ServiceSpec
    from llmd.server.generate import ModelService

State = Literal["loading", "ready", "draining", "failed"]
_MAX_NAMED = 32  # models and adapters, in an error
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
    takes_last_requests: bool = False  # while draining: what came over connections accepted before is still served
    drain: Callable[[str], None] | None = None  # begin to drain, told why; what SIGTERM does
    progress: LoadProgress = field(default_factory=lambda: LoadProgress("starting", 0.0))
    metrics: Metrics = field(default_factory=Metrics)
    shared: dict[str, Any] = field(default_factory=dict)  # what a plugin's own routes and services share, by its name

    requests: RequestLog = field(init=False)
    quotas: Quotas = field(init=False)  # of keys
    reload: Callable[[bool], Awaitable[dict[str, Any]]] | None = None  # read the configuration again; True: only tell

    def __post_init__(self) -> None:
        self.metrics.models = self.models
        self.quotas = Quotas(self.config.keys)
        self.requests = RequestLog(self.config.log.recent_requests)

    def record(self, receipt: Receipt, status: int) -> RequestSummary:
        """A request ended: tell the metrics, the plugins and whoever looks later. Called exactly once for each."""
        self.requests.close(receipt)
        summary = receipt.summary(status)
        self.requests.keep(summary)
        self.metrics.observe(summary)
        self.request_finished(summary)
        return summary

    def settings(self, section: str) -> Any:
        """The parsed `[plugins.<section>]` table."""
        return self.sections[section]

    def models(self) -> list[ModelService]:
        """Every model once, however many names it has."""
        return list({id(service): service for service in self.services.values()}.values())

    def allowed(self) -> dict[str, ModelService]:
        """The served names that the key of the request being handled may use, and their models."""
        key = current_key.get()
        return {name: service for name, service in self.services.items() if self.quotas.allows(key, service.names)}

    def service(self, name: str | None = None) -> ModelService:
        """The model of that name, ready to serve; None means the default. Raises ModelNotFound or NotReady.

        While a request is handled, there are only the models that its key may use.
        """
        allowed = self.allowed()
        service = (allowed.get(name) or self._with_adapter(name)) if name is not None else next(iter(allowed.values()), None)
        if self.state == "failed" or (self.state == "draining" and not self.takes_last_requests):
            raise NotReady(f"the server is {self.state}")
        if service is None:
            if self.state == "loading":
                raise NotReady(f"the server is loading: {self.progress.phase}", retry_after_s=5)
            known = ", ".join(map(repr, self._known_names(allowed))) or "none to this key"
            raise ModelNotFound(f"model {name!r} is not served; served: {known}", param="model", code="model_not_found")
        if service.state != "ready":
            raise NotReady(f"model {service.names[0]!r} is {service.state}", retry_after_s=5)
        return service

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a name which `service` has found stands for; None where it is the model's own."""
        return None if name is None or name in self.services else name

    def adapters(self, service: ModelService) -> list[AdapterInfo]:
        """The adapters of a model that the key of the request being handled may use."""
        key = current_key.get()
        return [info for info in service.adapters.list() if self.quotas.allows(key, service.names, info.name)]

    def _with_adapter(self, name: str) -> ModelService | None:
        """The model that has an adapter of this name; there are only the adapters that the request's key may use."""
        key = current_key.get()
        for service in () if name in self.services else self.models():
            if self.quotas.allows(key, service.names, name) and service.adapters.find(name):
                return service
        return None

    def _known_names(self, allowed: dict[str, ModelService]) -> list[str]:
        """What a client that asked for something else may ask for, in short."""
        services = {id(service): service for service in allowed.values()}.values()
        names = [*allowed, *(info.name for service in services for info in self.adapters(service))]
        return names[:_MAX_NAMED]


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


def _built_once(context: ServerContext, spec: RouteSpec) -> RouteSpec:
    """The spec with its handler built: every listener has the same one."""
    handler = spec.build(context)
    return replace(spec, build=lambda context: handler)


async def _close_while_draining(request: web.Request, response: web.StreamResponse) -> None:
    """No further request is wanted over a connection of a server that goes away."""
    if request.app[CONTEXT].state == "draining" and request.transport is not None:
        response.headers.setdefault("Connection", "close")
        response.force_close()


def create_app(context: ServerContext) -> web.Application:
    """Build the app: the server's own routes and the plugins' ones, wrapped in the middlewares."""
    own = [_built_once(context, spec) for spec in (*health.routes(), *openapi.routes(), *admin.routes())]
    context.routes = [*own, *context.routes]
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
    app.on_response_prepare.append(_close_while_draining)
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
    return Runner(
        app,
        handler_cancellation=True,
        access_log=None,
        max_line_size=max_header_bytes,
        max_field_size=max_header_bytes,
        lingering_time=2.0,  # how long the rest of a refused body is read, so that its sender can see the answer
        logger=ProtocolLog(logging.getLogger("llmd.http"), {}),
        **options,
    )
