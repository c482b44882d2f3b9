"""Calls to the admin routes of a running daemon: over its UNIX socket, or over HTTP with an admin key."""

from __future__ import annotations

import http.client
import json
import os
import socket
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import click

_TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 64 << 20


class Unreachable(click.ClickException):
    """Nobody answers where the daemon should be."""


class Refused(click.ClickException):
    """The daemon answered with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Target(NamedTuple):
    """Where a daemon listens for its operators: a socket's path, or a URL and the key for it."""

    socket_path: str = ""
    url: str = ""
    key: str = ""

    def __str__(self) -> str:
        return self.url or self.socket_path


def configured_socket(config_file: str | None) -> str | None:
    """What a configuration file says of the admin socket; only that is read."""
    if config_file is None:
        return None
    try:
        with open(config_file, "rb") as file:
            found = tomllib.load(file).get("server", {}).get("admin_socket")
    except (OSError, tomllib.TOMLDecodeError, AttributeError) as error:
        raise click.UsageError(f"--config {config_file}: {error}") from None
    return found if isinstance(found, str) else None


def find_target(
    socket_path: str | None, url: str | None, key: str | None, environ: Mapping[str, str] = os.environ
) -> Target:
    """The daemon that is meant: as told, else by the variables that the daemon itself goes by, else systemd's."""
    if url:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise click.UsageError(f"--url must be like http://127.0.0.1:8000, got {url!r}")
        return Target(url=url.rstrip("/"), key=key or "")
    folder = environ.get("RUNTIME_DIRECTORY", "/run/llmd").partition(":")[0]
    return Target(socket_path=socket_path or environ.get("LLMD_SERVER__ADMIN_SOCKET") or os.path.join(folder, "admin.sock"))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Admin:
    """`Admin(target).get("/admin/status")`: the answer's JSON. Raises Unreachable and Refused."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get(self, path: str) -> Any:
        """A GET."""
        return self._call("GET", path, None)

    def post(self, path: str, body: Any, *, refusal: int | None = None) -> Any:
        """A POST of JSON; an answer with the status `refusal` is one like any other."""
        return self._call("POST", path, json.dumps(body), refusal)

    def _call(self, method: str, path: str, body: str | None, refusal: int | None = None) -> Any:
        connection = self._connection()
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.target.key:
            headers["Authorization"] = f"Bearer {self.target.key}"
        try:
            connection.request(method, urlsplit(self.target.url).path + path, body, headers)
            answer = connection.getresponse()
            status = 200 if answer.status == refusal else answer.status
            return _parse(status, answer.read(_MAX_ANSWER_BYTES))
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            hint = "" if self.target.url else " (is it running, with server.admin_socket? --socket or --url name another)"
            raise Unreachable(f"no daemon answers at {self.target}: {reason}{hint}") from None
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if not self.target.url:
            return _UnixConnection(self.target.socket_path)
        parts = urlsplit(self.target.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)


def _parse(status: int, body: bytes) -> Any:
    try:
        answer = json.loads(body)
    except ValueError:
        raise Refused(f"the answer ({status}) is no JSON: {body[:80]!r}", status) from None
    if status < 400:
        return answer
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    raise Refused(str(message or f"the daemon answered {status}"), status)
