"""What systemd is told over NOTIFY_SOCKET; without one every call does nothing."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


class Notifier:
    """The datagram socket of sd_notify(3). A lost message is logged once and never stops the daemon."""

    def __init__(self, address: str | None = None) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None
        self._has_failed = False
        self._status = ""

    @property
    def watchdog_s(self) -> float | None:
        """Within how many seconds systemd wants a sign of life, if it asks this process for one."""
        interval, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
        if self._socket is None or not interval.isdecimal() or (pid and pid != str(os.getpid())):
            return None
        return int(interval) / 1e6 or None

    def _send(self, *lines: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            if not self._has_failed:
                log.warning("systemd cannot be told anything: %s", error.strerror)
            self._has_failed = True

    def ready(self, status: str) -> None:
        """Start-up is over."""
        self._status = status
        self._send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; sent only when it changes."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def stopping(self, status: str) -> None:
        """Shutdown began."""
        self._status = status
        self._send("STOPPING=1", f"STATUS={status}")

    def watchdog(self) -> None:
        """A sign of life: to be called only on proof that the daemon makes progress."""
        self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Loading or draining goes on and wants this much more time."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def close(self) -> None:
        """Free the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
