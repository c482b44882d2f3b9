"""Where the daemon listens: the API, the operators' UNIX socket, the metrics; opened here or handed down by a supervisor.

    api      every route                   TCP (or UNIX)   closed when a drain begins
    admin    admin routes, health          UNIX            its file's permission is the key
    metrics  /metrics and nothing else     TCP             no key

systemd hands sockets down by number (sd_listen_fds(3)): they begin at 3, LISTEN_FDS says how many, LISTEN_FDNAMES what each
is for. Such a socket takes the place of what the configuration would open, and is never shut down here: the supervisor holds
it too, so what connects while no process accepts waits in the kernel for the next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmd.errors import CannotListen, ConfigError

if TYPE_CHECKING:
    from llmd.config import Config

FIRST_FD = 3
KINDS = ("api", "admin", "metrics")
BACKLOG = 1024  # connections that wait to be accepted
_UNNAMED = ("", "unknown", "llmd.socket")  # what a socket unit without FileDescriptorName= gives
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class Inherited(NamedTuple):
    """The sockets that were handed down, by what they are for."""

    api: tuple[socket.socket, ...] = ()
    admin: tuple[socket.socket, ...] = ()
    metrics: tuple[socket.socket, ...] = ()


def inherit(env: MutableMapping[str, str] | None = None) -> Inherited:
    """Take over the sockets that the environment speaks of, once: children are not to find them. Raises ConfigError."""
    env = os.environ if env is None else env
    pid, count, names = (env.pop(name, "") for name in _VARIABLES)
    if pid != str(os.getpid()) or not count.isdecimal() or count == "0":
        return Inherited()
    found: dict[str, list[socket.socket]] = {kind: [] for kind in KINDS}
    given = names.split(":") if names else []
    for index in range(int(count)):
        name = given[index] if index < len(given) else ""
        found[_kind(name)].append(_adopt(FIRST_FD + index, name))
    for taken in found["admin"]:
        if taken.family != socket.AF_UNIX:
            raise ConfigError(
                "the socket handed down as 'admin' is no UNIX socket; allowed: one, for its permission is its key"
            )
    return Inherited(**{kind: tuple(sockets) for kind, sockets in found.items()})


def _kind(name: str) -> str:
    if name in KINDS:
        return name
    if name in _UNNAMED:
        return "api"
    raise ConfigError(f"a socket is handed down as {name!r}; allowed (FileDescriptorName=): {', '.join(KINDS)}")


def _adopt(number: int, name: str) -> socket.socket:
    """A socket object for a number; raises ConfigError for what is not a listening stream socket."""
    try:
        os.set_inheritable(number, False)
        taken = socket.socket(fileno=number)
        listens = taken.type == socket.SOCK_STREAM and taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ConfigError(f"file descriptor {number}, handed down as {name!r}, cannot be used: {error.strerror}") from None
    if not listens:
        raise ConfigError(f"file descriptor {number}, handed down as {name!r}, is no listening stream socket")
    taken.setblocking(False)
    return taken


def admin_socket_path(config: Config, env: Mapping[str, str] | None = None) -> Path | None:
    """Where operators find the daemon: `server.admin_socket`, else admin.sock in $RUNTIME_DIRECTORY, else nowhere.

    An empty `server.admin_socket` means nowhere.
    """
    if config.server.admin_socket is not None:
        return Path(config.server.admin_socket) if config.server.admin_socket else None
    folder = (os.environ if env is None else env).get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(folder) / "admin.sock" if folder else None


class UnixListener:
    """A UNIX socket bound to a path. A file that a dead process left is replaced, a living one's is not."""

    def __init__(self, path: str | os.PathLike[str], *, mode: int | None = None) -> None:
        """Bind, and listen only when the permission is set: until then nobody can connect. Raises OSError."""
        self.path = os.fspath(path)
        self._identity: tuple[int, int] | None = None
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if not self.path.startswith("\0"):
                _remove_stale(self.path)
            self.socket.bind(self.path)
            if not self.path.startswith("\0"):
                if mode is not None:
                    os.chmod(self.path, mode)
                self._identity = _identity(self.path)
            self.socket.listen(BACKLOG)
        except OSError:
            self.close()
            raise
        self.socket.setblocking(False)

    def close(self) -> None:
        """Close it and remove its file, unless another process has put its own there since."""
        self.socket.close()
        if self._identity is not None and _identity(self.path) == self._identity:
            with contextlib.suppress(OSError):  # the folder may be gone, or read-only by now
                os.unlink(self.path)
        self._identity = None


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on. Raises OSError (EADDRINUSE) for one in use and for what is no socket."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "there is a file that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except BlockingIOError:
            pass  # its queue is full: somebody is there
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def peer_user(connection: socket.socket) -> str:
    """Who is at the other end of a UNIX socket, as the kernel knows it: `uid-0`."""
    if sys.platform != "linux":
        return "uid-unknown"
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return f"uid-{int.from_bytes(raw[4:8], sys.byteorder)}"


def cannot_listen(config: Config, key: str, address: str, error: OSError) -> CannotListen | ConfigError:
    """The error of a listener: an address in use is worth another try (exit 75), anything else is not (78)."""
    # asyncio puts the address into the message once more
    reason = (error.strerror or str(error)).rpartition(": ")[2]
    problem = config.problem(("server", key), f"cannot listen on {address}: {reason}")
    return CannotListen(problem) if error.errno == errno.EADDRINUSE else ConfigError(problem)
