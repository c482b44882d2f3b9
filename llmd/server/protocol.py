"""HTTP below the application: what a client hears whose request cannot be read, or whose handler is beyond help."""

from __future__ import annotations

from aiohttp import web

from llmd.server.errors import WireError, error_response

_MAX_REASON = 200  # characters of what the parser says


class Runner(web.AppRunner):
    """An AppRunner whose connections tell every error in our shape."""

    __slots__ = ()

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server  # aiohttp names the class of it, and of its connections, itself
        return server


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """As aiohttp does, which logs it; the answer in JSON. Raises ConnectionError where some of another is sent."""
        super().handle_error(request, status, exc, message)
        response = error_response(_told(status, message))
        response.force_close()
        return response


def _told(status: int, message: str | None) -> WireError:
    if status >= 500:
        return WireError(status, "internal server error", "server_error", None, "internal_error")
    reason = "".join(c if c.isprintable() else " " for c in (message or "").partition("\n")[0])[:_MAX_REASON].strip(" :")
    said = f"the request is no HTTP that can be read: {reason}" if reason else "the request is no HTTP that can be read"
    return WireError(status, said, "invalid_request_error", None, "invalid_http")
