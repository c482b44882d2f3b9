"""The open listeners and the connections that came over them: who is busy, who is idle, who has not asked anything yet.

What a connection is doing, aiohttp's handler of it knows: `_request_count` (requests begun), `_request_in_progress`, and
`_waiter`, which is there while it waits for a further one.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import sys
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd._version import __version__
from llmd.credentials import secret_path
from llmd.errors import ConfigError
from llmd.listeners import BACKLOG, Inherited, UnixListener, admin_socket_path, cannot_listen
from llmd.server.app import create_app, make_runner
from llmd.server.operators import create_admin_app, create_metrics_app

if TYPE_CHECKING:
    from llmd.config import Config
    from llmd.server.app import ServerContext

log = logging.getLogger("llmd.daemon")

_OF_THE_PORT = (errno.EADDRINUSE, errno.EACCES)


class _UnixSocketSite(web.BaseSite):
    """aiohttp's UnixSite takes a path only, and its SockSite no UNIX socket under uvloop."""

    def __init__(self, runner: web.AppRunner, listening: socket.socket) -> None:
        super().__init__(runner)
        self._socket = listening

    @property
    def name(self) -> str:
        """Where it listens."""
        return f"unix:{self._socket.getsockname()}"

    async def start(self) -> None:
        """Accept connections."""
        await super().start()
        # from Python 3.13 on the file would be removed with the server, even if it is a supervisor's
        options: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        loop, server = asyncio.get_running_loop(), self._runner.server
        assert server is not None
        self._server = await loop.create_unix_server(server, sock=self._socket, backlog=BACKLOG, **options)


class Sites:
    """Every listener of the daemon, opened in the order api, admin, metrics; only the API's is handed back at a drain."""

    def __init__(self, config: Config, context: ServerContext, inherited: Inherited, *, last_words_s: float) -> None:
        self._config, self._context, self._inherited = config, context, inherited
        self._last_words_s = last_words_s
        self._runners: list[web.AppRunner] = []
        self._files: list[UnixListener] = []
        self._api: web.AppRunner
        self._api_file: UnixListener | None = None
        self._tls: ssl.SSLContext | None = None

    async def open(self) -> None:
        """Listen. Raises CannotListen and ConfigError; `close` is to be called also then."""
        self._api = await self._add(create_app(self._context))
        await self._open_api()
        await self._open_admin()
        await self._open_metrics()

    async def _add(self, app: web.Application) -> web.AppRunner:
        runner = make_runner(app, shutdown_timeout=self._last_words_s)
        self._runners.append(runner)
        await runner.setup()
        return runner

    async def _open_api(self) -> None:
        server = self._config.server
        context = _ssl_context(self._config)
        if self._inherited.api:
            self._tls = context
        elif server.uds:
            self._api_file = await self._open_unix(self._api, server.uds, "uds", None)
        else:
            await self._open_tcp(self._api, "port", server.host, server.port, context)
        waiting = " once it is ready: until then clients wait" if self._inherited.api else ""
        log.info("llmd %s listens on %s%s", __version__, self._url(), waiting)

    async def accept(self) -> None:
        """Let the clients in that wait at a supervisor's socket: a restart is nothing but a pause to them."""
        await self._take_over(self._api, self._inherited.api, self._tls)

    async def _open_admin(self) -> None:
        path = admin_socket_path(self._config)
        if not self._inherited.admin and path is None:
            return
        runner = await self._add(create_admin_app(self._context))
        if self._inherited.admin:
            await self._take_over(runner, self._inherited.admin)
        else:
            await self._open_unix(runner, str(path), "admin_socket", int(self._config.server.admin_socket_mode, 8))
        log.info("admin routes at %s", ", ".join(site.name for site in runner.sites))

    async def _open_metrics(self) -> None:
        server = self._config.server
        if not self._inherited.metrics and server.metrics_port is None:
            return
        runner = await self._add(create_metrics_app(self._context))
        if self._inherited.metrics:
            await self._take_over(runner, self._inherited.metrics)
        else:
            await self._open_tcp(runner, "metrics_port", server.metrics_host, server.metrics_port or 0)
        log.info("metrics at %s", ", ".join(_shown(address) for address in runner.addresses))

    async def _take_over(
        self, runner: web.AppRunner, sockets: tuple[socket.socket, ...], context: ssl.SSLContext | None = None
    ) -> None:
        """Accept from copies: closing them leaves the supervisor's socket, and what waits in it, as they are."""
        for inherited in sockets:
            copy = inherited.dup()
            if copy.family == socket.AF_UNIX:
                await _UnixSocketSite(runner, copy).start()
            else:
                await web.SockSite(runner, copy, ssl_context=context, backlog=BACKLOG).start()

    async def _open_tcp(
        self, runner: web.AppRunner, key: str, host: str, port: int, context: ssl.SSLContext | None = None
    ) -> None:
        try:
            await web.TCPSite(runner, host, port, ssl_context=context, backlog=BACKLOG).start()
        except OSError as error:
            key = key if error.errno in _OF_THE_PORT else key.replace("port", "host")
            raise cannot_listen(self._config, key, f"{host!r}, port {port}", error) from None

    async def _open_unix(self, runner: web.AppRunner, path: str, key: str, mode: int | None) -> UnixListener:
        try:
            made = UnixListener(path, mode=mode)
        except OSError as error:
            raise cannot_listen(self._config, key, repr(path), error) from None
        self._files.append(made)
        await _UnixSocketSite(runner, made.socket).start()
        return made

    def _url(self) -> str:
        server = self._config.server
        addresses = [given.getsockname() for given in self._inherited.api] or self._api.addresses
        address = next(iter(addresses), None)
        if address is None or isinstance(address, str):
            return f"unix:{address or server.uds}"
        host = server.host if not self._inherited.api else address[0]
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if server.ssl_certfile else 'http'}://{host}:{address[1]}{server.root_path}"

    # --- the drain

    async def stop_accepting(self) -> None:
        """Hand the API's listener back; operators and metrics are still answered."""
        for site in list(self._api.sites):
            await site.stop()
        if self._api_file is not None:
            self._api_file.close()

    def _connections(self) -> list[Any]:
        server = self._api.server
        return server.connections if server is not None else []

    def num_silent(self) -> int:
        """Connections over which no request has come yet."""
        return sum(not connection._request_count for connection in self._connections())

    def num_busy(self) -> int:
        """Connections with a request that is not answered to its end."""
        return sum(connection._request_in_progress for connection in self._connections())

    def close_idle(self) -> None:
        """Close connections that wait for a further request; busy ones close behind their answer."""
        for connection in self._connections():
            if connection._request_count and connection._waiter is not None and not connection._messages:
                connection.force_close()  # the transport sends what it still holds first

    async def close(self) -> None:
        """Close every listener and connection, the latest first."""
        for runner in reversed(self._runners):
            await runner.cleanup()
        for made in self._files:
            made.close()
        for inherited in (*self._inherited.api, *self._inherited.admin, *self._inherited.metrics):
            inherited.close()


def _shown(address: Any) -> str:
    return f"unix:{address}" if isinstance(address, str) else f"http://{address[0]}:{address[1]}"


def _ssl_context(config: Config) -> ssl.SSLContext | None:
    server = config.server
    if not server.ssl_certfile:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        key_file = secret_path(server.ssl_keyfile) if server.ssl_keyfile else None
        context.load_cert_chain(secret_path(server.ssl_certfile), key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(config.problem(("server", "ssl_certfile"), f"cannot be used: {error}")) from None
    return context
