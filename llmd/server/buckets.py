"""Rates: so much a minute, in integers, so that nothing is lost or won by rounding."""

from __future__ import annotations

import time
from collections.abc import Callable

_MINUTE_NS = 60 * 10**9


class TokenBucket:
    """Holds at most `per_minute` and is refilled at that rate; begins full. Loop thread only.

    The level is kept in units of 1 / 60e9: a nanosecond brings exactly `per_minute` of them.
    """

    def __init__(self, per_minute: int, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.per_minute = per_minute
        self._clock_ns = clock_ns
        self._level = per_minute * _MINUTE_NS
        self._filled_ns = clock_ns()

    def _fill(self) -> None:
        now_ns = self._clock_ns()
        elapsed_ns = max(0, now_ns - self._filled_ns)
        self._filled_ns = max(now_ns, self._filled_ns)
        self._level = min(self._level + elapsed_ns * self.per_minute, self.per_minute * _MINUTE_NS)

    @property
    def available(self) -> int:
        """What could be taken now; below zero after more was spent than there was."""
        self._fill()
        return self._level // _MINUTE_NS

    def wait_s(self, amount: int) -> float:
        """Seconds until `amount` (at most `per_minute`) can be taken; 0: now."""
        self._fill()
        lacking = min(amount, self.per_minute) * _MINUTE_NS - self._level
        return max(0, -(-lacking // self.per_minute)) / 1e9

    def take(self, amount: int) -> None:
        """Take it, even if there is less: the debt is paid back by the refill."""
        self._fill()
        self._level -= amount * _MINUTE_NS

    def give_back(self, amount: int) -> None:
        """Return what was taken and not used."""
        self._fill()
        self._level = min(self._level + amount * _MINUTE_NS, self.per_minute * _MINUTE_NS)

    def set_rate(self, per_minute: int) -> None:
        """Another rate from now on; what is spent stays spent."""
        self._fill()
        spent = self.per_minute * _MINUTE_NS - self._level
        self.per_minute = per_minute
        self._level = per_minute * _MINUTE_NS - spent
