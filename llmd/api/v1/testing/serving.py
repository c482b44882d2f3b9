"""What needs a server: a daemon in a process of its own, routes and authenticators behind the real middlewares."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from llmd.api.v1 import Authenticator, Principal, RouteSpec, ServerContext
from llmd.api.v1.testing.compare import require

_MAX_START_S = 120.0


class Answer(NamedTuple):
    """A whole HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON; raises ValueError where it is none."""
        return json.loads(self.body)


class Server:
    """`llmd serve` with these arguments as a child process on a free port; leaving the context ends it.

    `environment` is added to this process's. AssertionError with the log where it does not come up.
    """

    def __init__(self, *arguments: str, **environment: str) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("LLMD_")}
        command = [sys.executable, "-m", "llmd", "serve", *arguments, "--port", "0"]
        self._process = subprocess.Popen(command, env=env | environment, stderr=subprocess.PIPE, text=True)
        self._lines: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        self._wait_for(r"ready after")
        return self

    def __exit__(self, *failure: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(5)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._more:
                self._lines.append(line.rstrip("\n"))
                self._more.notify_all()
        with self._more:
            self._more.notify_all()

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return "\n".join(self._lines)

    def _wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + _MAX_START_S
        with self._more:
            while (found := re.search(pattern, self.log)) is None:
                if not self._reader.is_alive() or time.monotonic() > deadline:
                    self._process.kill()
                    raise AssertionError(f"the server says nothing of {pattern!r}:\n{self.log}")
                self._more.wait(0.2)
        return found

    @property
    def url(self) -> str:
        """Where it listens, as "http://127.0.0.1:PORT"."""
        return self._wait_for(r'listens on ([^\s"]+)')[1]

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """One request, `body` sent as JSON; an error status is an answer too."""
        data = None if body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read())


class Wanted(NamedTuple):
    """A request and the status that it must have."""

    status: int
    method: str = "GET"
    path: str = ""  # none: the route's own
    body: Any = None  # sent as JSON
    headers: Mapping[str, str] = {}


@contextlib.asynccontextmanager
async def _serving(context: ServerContext) -> AsyncIterator[str]:
    from aiohttp import web

    from llmd.server.app import create_app, make_runner

    runner = make_runner(create_app(context), shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def check_route(
    spec: RouteSpec,
    requests: Sequence[Wanted],
    *,
    context: ServerContext | None = None,
    check: Callable[[Wanted, Answer], None] | None = None,
) -> None:
    """Serve the route as the daemon does and send it requests; bodies that are no JSON besides, where it takes a body.

    Each must have its status; errors carry OpenAI's body; the route is in /openapi.json. `check` looks further at an
    answer. `context` replaces one that has no models. Not to be called on a running event loop.
    """
    from llmd.config import Config

    context = context or ServerContext(config=Config(), state="ready")
    context.routes = [spec]
    asyncio.run(_check_route(spec, requests, context, check))


async def _check_route(
    spec: RouteSpec, requests: Sequence[Wanted], context: ServerContext, check: Callable[[Wanted, Answer], None] | None
) -> None:
    import aiohttp

    async with _serving(context) as url, aiohttp.ClientSession() as session:

        async def send(method: str, path: str, **options: Any) -> Answer:
            async with session.request(method, url + path, **options) as answer:
                return Answer(answer.status, answer.headers, await answer.read())

        for wanted in requests:
            path = wanted.path or spec.path
            answer = await send(wanted.method, path, json=wanted.body, headers=wanted.headers)
            require(answer.status == wanted.status, f"{wanted} was answered with {answer.status}: {answer.body[:500]!r}")
            _check_error(f"{wanted.method} {path}", answer)
            if check is not None:
                check(wanted, answer)
        for body in (b"", b"{", b"[1", b"\xff\xfe", b"null") if spec.method == "POST" else ():
            answer = await send("POST", spec.path, data=body, headers={"Content-Type": "application/json"})
            require(
                answer.status in (*range(200, 500), 503),
                f"a body of {body!r} was answered with {answer.status}; expected: 4xx",
            )
            _check_error(f"a body of {body!r}", answer)
        if spec.openapi is not None:
            require("responses" in spec.openapi(), "openapi() tells no responses")


def _check_error(what: str, answer: Answer) -> None:
    if answer.status < 400:
        return
    try:
        error = answer.json()["error"]
        is_whole = {"message", "type", "code"} <= set(error)
    except (ValueError, KeyError, TypeError):
        is_whole = False
    require(is_whole, f"{what}: {answer.body[:200]!r} is no OpenAI error (RequestRefused makes one)")


def check_authenticator(
    authenticator: Authenticator, *, known: Sequence[Mapping[str, str]], unknown: Sequence[Mapping[str, str]] = ()
) -> None:
    """Headers of senders that it knows, and of those that it does not; odd headers besides, which it must not know.

    A principal's `key` is not empty and tells no header's value. Not to be called on a running event loop.
    """
    require(
        inspect.iscoroutinefunction(authenticator.authenticate), "authenticate must be `async def`: the loop waits for it"
    )
    odd: list[Mapping[str, str]] = [
        {}, {"Authorization": ""}, {"Authorization": "Bearer "}, {"Authorization": "Bearer é\udcff"},
        {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer " + "x" * 9000},
    ]  # fmt: skip
    asyncio.run(_check_authenticator(authenticator, known, [*unknown, *odd]))


async def _check_authenticator(
    authenticator: Authenticator, known: Sequence[Mapping[str, str]], unknown: Sequence[Mapping[str, str]]
) -> None:
    for headers in known:
        principal = await authenticator.authenticate(headers, "127.0.0.1")
        require(isinstance(principal, Principal), f"{dict(headers)} are not known; expected: a Principal")
        assert principal is not None
        require(bool(principal.key), "Principal.key is empty, which means nobody")
        told = [name for name, value in headers.items() if principal.key in value.split()]
        require(not told, f"Principal.key tells the secret of {told}; allowed: a name for it")
    for headers in unknown:
        found = await authenticator.authenticate(headers, None)
        require(found is None, f"{str(dict(headers))[:200]} are known as {found}; expected: None")
