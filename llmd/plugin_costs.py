"""What plugins cost in each step of a running daemon, as `llmd plugins --timing --url` shows it."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from llmd.errors import ConfigError

_TIMEOUT_S = 10.0
_MAX_BYTES = 16 << 20
_UNIX = "unix:"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """To the daemon's admin socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask_daemon(url: str, admin_key: str | None = None) -> list[dict[str, Any]]:
    """The rows of /admin/plugins. `url`: http://HOST:PORT, or unix:PATH of the admin socket. Raises ConfigError."""
    connection = _connection(url)
    headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
    try:
        connection.request("GET", "/admin/plugins", headers=headers)
        answer = connection.getresponse()
        status, body = answer.status, answer.read(_MAX_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(f"--url: no daemon answers at {url}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        connection.close()
    if status != 200:
        raise ConfigError(f"--url: {url} answers with status {status}; an admin key may help (--admin-key)")
    try:
        rows: list[dict[str, Any]] = json.loads(body)["plugins"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--url: what {url} answers is no list of plugins") from None
    return rows


def _connection(url: str) -> http.client.HTTPConnection:
    if url.startswith(_UNIX):
        return _UnixConnection(url.removeprefix(_UNIX))
    try:
        parts = urlsplit(url)
        kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}[parts.scheme]
        return kind(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    except (KeyError, ValueError):
        raise ConfigError(f"--url must be like http://127.0.0.1:8000 or unix:/run/llmd/admin.sock, got {url!r}") from None


def step_table(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A line for each object of a wheel that takes part in steps, the dearest first."""
    costs = [(row["name"], name, cost) for row in rows for name, cost in row.get("steps", {}).items()]
    for plugin, name, cost in sorted(costs, key=lambda entry: -entry[2]["seconds"]):
        per_call = 1e6 * cost["seconds"] / max(cost["calls"], 1)
        told = f"{cost['failures']} failed" if cost["failures"] else "slow" if cost["is_slow"] else ""
        yield name, plugin, f"{cost['calls']}", f"{per_call:.0f} us", f"{cost['seconds']:.2f} s", told
