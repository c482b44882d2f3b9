"""The daemon's own routes called from within, without a socket and without a key: for batches and background work.

A call goes the whole way of a request (plugins' middlewares, parsing, errors, its own receipt), only its bytes travel in
memory. The caller has been let in before, and names the key that the call is counted by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from aiohttp import web

from llmd.server.auth import ORDER
from llmd.server.errors import wire_error
from llmd.server.middleware import make_outermost_middleware, receipt_of
from llmd.server.quotas import current_key

if TYPE_CHECKING:
    from llmd.server.app import ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_KEY: ContextVar[str] = ContextVar("local_call_key", default="")


class LocalAnswer(NamedTuple):
    """A whole answer."""

    status: int
    body: bytes


class _Pipe(asyncio.Transport):
    """What the server writes to; holds the answer until the server closes it."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def data(self) -> bytes:
        return b"".join(self._pieces)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._pieces.append(bytes(data))

    def close(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    abort = close

    def is_closing(self) -> bool:
        return self.closed.done()

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        """All there is to read has been read."""

    def resume_reading(self) -> None:
        """All there is to read has been read."""

    def is_reading(self) -> bool:
        return True


class LocalClient:
    """`async with LocalClient(context, paths) as client: answer = await client.call("POST", path, body, key=…)`.

    Takes the routes of `paths` that the daemon has; others answer 404.
    """

    def __init__(self, context: ServerContext, paths: Sequence[str]) -> None:
        app = web.Application(
            middlewares=_middlewares(context),
            client_max_size=context.config.server.max_body_bytes,
        )
        for spec in context.routes:
            if spec.path in paths:
                app.router.add_route(spec.method, spec.path, spec.build(context))
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, keepalive_timeout=0.0)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def call(
        self, method: str, path: str, body: bytes, *, key: str = "", headers: Mapping[str, str] | None = None
    ) -> LocalAnswer:
        """The answer; leaving (a cancelled task) ends the request as a client's leaving does."""
        server = self._runner.server
        if server is None:
            raise RuntimeError("the local client is closed")
        pipe, protocol = _Pipe(), server()
        token = _KEY.set(key)  # the handler's task copies the context that it is made in
        try:
            protocol.connection_made(pipe)
        finally:
            _KEY.reset(token)
        try:
            protocol.data_received(_head(method, path, len(body), headers or {}) + body)
            await pipe.closed
        finally:
            protocol.connection_lost(None)
        return _answer(pipe.data)


def _middlewares(context: ServerContext) -> list[Any]:
    """Those of a request from outside, in their order; the named key takes the place of the asking for one."""
    built = [(spec.order, spec.build(context.config)) for spec in context.middlewares]
    layers = [(ORDER, _take_key), *((order, middleware) for order, middleware in built if middleware is not None)]
    layers.sort(key=lambda layer: layer[0])
    return [make_outermost_middleware(context), *(middleware for _, middleware in layers)]


def _head(method: str, path: str, length: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode("ascii")


def _answer(data: bytes) -> LocalAnswer:
    head, _, body = data.partition(b"\r\n\r\n")
    parts = head.split(b" ", 2)
    if len(parts) < 2:
        answer = wire_error(ConnectionResetError())
        return LocalAnswer(answer.status, answer.body())
    return LocalAnswer(int(parts[1]), body)


@web.middleware
async def _take_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count the call by the key that its caller named."""
    receipt_of(request).key = _KEY.get()
    current_key.set(_KEY.get())
    return await handler(request)
