"""Log entries with fields for systemd's journal, by its native protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/)."""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import re
import socket
import sys
from collections.abc import Mapping
from typing import Any

ADDRESS = "/run/systemd/journal/socket"
_NOT_IN_NAME = re.compile(r"[^A-Z0-9_]")
_MAX_NAME = 64
# syslog's levels, which the journal keeps as PRIORITY
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7


def is_journal(stream_fd: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a descriptor leads to the journal: systemd names its device and inode in JOURNAL_STREAM (systemd.exec(5))."""
    told = environ.get("JOURNAL_STREAM", "")
    try:
        found = os.fstat(stream_fd)
    except OSError:
        return False
    return told == f"{found.st_dev}:{found.st_ino}"


def priority_of(level: int) -> int:
    """The syslog priority of a logging level."""
    return next((priority for at_least, priority in _PRIORITIES if level >= at_least), _DEBUG)


def field_name(name: str) -> str:
    """A name that the journal takes: capital letters, digits and underscores, ours led by LLMD_."""
    return ("LLMD_" + _NOT_IN_NAME.sub("_", name.upper()))[:_MAX_NAME]


def encode(fields: Mapping[str, Any]) -> bytes:
    """One entry: `NAME=value` lines; a value with line breaks is led by its length, 64 bits little endian."""
    lines = []
    for name, value in fields.items():
        raw = str(value).encode("utf-8", "replace")
        if b"\n" in raw:
            lines.append(name.encode() + b"\n" + len(raw).to_bytes(8, "little") + raw + b"\n")
        else:
            lines.append(name.encode() + b"=" + raw + b"\n")
    return b"".join(lines)


class JournalSocket:
    """Sends entries; never waits. Raises OSError when the journal is not there or cannot take more."""

    def __init__(self, address: str = ADDRESS) -> None:
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def send(self, entry: bytes) -> None:
        """One datagram, or a sealed memory file where the entry is too large for one."""
        try:
            self._socket.sendto(entry, self._address)
        except OSError as error:
            if not _is_too_large(error):
                raise
            self._send_file(entry)

    def _send_file(self, entry: bytes) -> None:
        descriptor = os.memfd_create("llmd-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(entry)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
            self._socket.sendmsg([], [rights], 0, self._address)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Send no more."""
        self._socket.close()


def _plain(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _is_too_large(error: OSError) -> bool:
    return error.errno in (errno.EMSGSIZE, errno.ENOBUFS)


class JournalHandler(logging.Handler):
    """One entry for each record, its extras as LLMD_… fields; what the journal does not take goes to stderr as text."""

    def __init__(self, extras: Any, fallback: logging.Formatter, address: str = ADDRESS) -> None:
        """`extras(record)` are the fields beside the message."""
        super().__init__()
        self._extras, self._fallback = extras, fallback
        self._journal = JournalSocket(address)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        try:
            self._journal.send(encode(self._fields(record)))
        except OSError:
            sys.stderr.write(self._fallback.format(record) + "\n")
        except Exception:  # noqa: BLE001  as every handler of logging: a record that cannot be shown stops nobody
            self.handleError(record)

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self._fallback.formatException(record.exc_info)
        fields = {
            "MESSAGE": message,
            "PRIORITY": priority_of(record.levelno),
            "SYSLOG_IDENTIFIER": "llmd",
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName,
            "LLMD_LOGGER": record.name,
        }
        own = {field_name(name): _plain(value) for name, value in self._extras(record).items() if value not in (None, "")}
        return fields | own

    def close(self) -> None:
        """Leave the journal."""
        self._journal.close()
        super().close()
