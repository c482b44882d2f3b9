"""Server-sent events: bytes that are built once, several events a write, a comment while nothing happens."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import ClassVar, Self

from aiohttp import web

from llmd.server.middleware import RECEIPT

KEEPALIVE_S = 15.0
MAX_UNSENT_BYTES = 64 << 10  # in the process, behind what the kernel takes
_KEEPALIVE = b": keepalive\n\n"
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}


def sse_event(payload: bytes) -> bytes:
    """One event around a JSON text."""
    return b"data: " + payload + b"\n\n"


class EventStream:
    """`async with EventStream(request) as events: await events.send(data)`.

    `send` waits while the client is slow: what comes meanwhile is merged by the one who makes it. `push` writes without a
    task. Both raise ConnectionError once the client has left. A stream that is quiet for `keepalive_s` to twice as long
    gets a comment, so that no proxy hangs up.
    """

    DONE: ClassVar[bytes] = b"data: [DONE]\n\n"

    __slots__ = (
        "_is_chunked",
        "_keepalive_s",
        "_loop",
        "_num_seen",
        "_num_sent",
        "_request",
        "_timer",
        "_transport",
        "_writing",
        "can_push",
        "response",
    )  # fmt: skip

    def __init__(self, request: web.Request, *, keepalive_s: float = KEEPALIVE_S) -> None:
        self.response = web.StreamResponse(headers=_HEADERS)
        self.can_push = False  # not before the headers are out
        self._request = request
        self._keepalive_s = keepalive_s
        self._num_sent = self._num_seen = 0  # writes, and how many of them the last look at the clock saw
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None  # a comment on its way; kept, or it could be collected
        self._transport: asyncio.Transport
        self._is_chunked = True

    async def __aenter__(self) -> Self:
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        self._transport = transport
        await self.response.prepare(self._request)
        self._is_chunked = "Transfer-Encoding" in self.response.headers
        self._timer = self._loop.call_later(self._keepalive_s, self._tick)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._writing is not None:
            self._writing.cancel()
        if kind is None:
            await self._tell_receipt()

    async def _tell_receipt(self) -> None:
        """A comment for who asked for it; a client that reads no further than the last event has lost nothing."""
        receipt = self._request.get(RECEIPT)
        if receipt is not None and receipt.is_wanted:
            with suppress(ConnectionError):
                await self.response.write(f": receipt {receipt.text()}\n\n".encode())

    async def send(self, data: bytes) -> None:
        """Write whole events; waits while the client is slow."""
        self._num_sent += 1
        await self.response.write(data)
        await self.drain()
        self.can_push = True

    async def drain(self) -> None:
        """Wait while the client is slow."""
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            await self._request.writer.drain()

    def push(self, data: bytes) -> bool:
        """Write whole events without waiting; False once the client is slow, and `drain` must come next.

        Only after a `send`, which takes the headers along. Goes past aiohttp's writer, whose bookkeeping costs as much as
        the rest.
        """
        transport = self._transport
        if transport.is_closing():
            raise ConnectionResetError("the client has left")
        self._num_sent += 1
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
        return transport.get_write_buffer_size() <= MAX_UNSENT_BYTES

    def _tick(self) -> None:
        """Look, once an interval and not once an event, whether it has been quiet for long."""
        if self._num_sent == self._num_seen:
            self._writing = self._loop.create_task(self._comment())
            self._num_seen += 1  # the comment's own write
        else:
            self._num_seen = self._num_sent
        self._timer = self._loop.call_later(self._keepalive_s, self._tick)

    async def _comment(self) -> None:
        try:
            await self.send(_KEEPALIVE)
        except ConnectionError:
            return  # the handler itself is told by its next write, or by its cancellation
