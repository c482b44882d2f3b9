"""One line on what the daemon does, for `systemctl status`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmd.server.generate import ModelService

_INTERVAL_S = 1.0  # a rate over less would only show how steps fall


class Rate:
    """How fast a counter grows, by readings at least a second apart."""

    def __init__(self) -> None:
        self.per_s = 0.0
        self._count: int | None = None
        self._at_s = 0.0

    def update(self, count: int, now_s: float | None = None) -> float:
        """Take a reading; the rate as it is known now."""
        now_s = time.monotonic() if now_s is None else now_s
        if self._count is None:
            self._count, self._at_s = count, now_s
        elif now_s - self._at_s >= _INTERVAL_S:
            self.per_s = (count - self._count) / (now_s - self._at_s)
            self._count, self._at_s = count, now_s
        return self.per_s


class StatusLine:
    """`34 running, 5 waiting, 812 tok/s`, over all models."""

    def __init__(self, services: Sequence[ModelService]) -> None:
        self._services = services
        self._rate = Rate()

    def text(self) -> str:
        """The line as it is now."""
        stats = [service.engine.stats() for service in self._services]
        rate = self._rate.update(sum(reading.num_output_tokens for reading in stats))
        running, waiting = sum(reading.num_running for reading in stats), sum(reading.num_waiting for reading in stats)
        return f"{running} running, {waiting} waiting, {rate:.0f} tok/s"
