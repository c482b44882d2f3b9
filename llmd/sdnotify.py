"""What systemd is told over NOTIFY_SOCKET (sd_notify(3)); without one every call does nothing."""

from __future__ import annotations

import logging
import os
import socket
import time

log = logging.getLogger(__name__)

STATUS_INTERVAL_S = 1.0  # between two STATUS lines that nobody waits for


class Notifier:
    """The datagram socket of sd_notify(3). A lost message is logged once and never stops the daemon."""

    def __init__(self, address: str | None = None) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = _datagram_socket() if address else None
        self._has_failed = False
        self._status = ""
        self._status_at_s = -STATUS_INTERVAL_S

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

    def _send_status(self, text: str, *before: str) -> None:
        self._status, self._status_at_s = text, time.monotonic()
        self._send(*before, f"STATUS={text}")

    def ready(self, status: str) -> None:
        """Start-up or a reload is over."""
        self._send_status(status, "READY=1")

    def reloading(self, status: str = "reloading the configuration") -> None:
        """A reload began; `ready` must follow, whatever came of it. systemd compares the clock with its signal's."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send_status(status, "RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; sent only when it changed, and at most once a second: call it again and again."""
        if text != self._status and time.monotonic() - self._status_at_s >= STATUS_INTERVAL_S:
            self._send_status(text)

    def stopping(self, status: str) -> None:
        """Shutdown began."""
        self._send_status(status, "STOPPING=1")

    def failed(self, status: str) -> None:
        """Serving cannot go on; the last line that `systemctl status` shows."""
        self._send_status(status)

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


def _datagram_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    made.setblocking(False)  # a supervisor that does not read must not hold up the event loop
    return made
