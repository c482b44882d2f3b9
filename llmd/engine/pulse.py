"""The one truth about life: what /health, /ready, systemd's watchdog and the end of a hung process go by.

A sign of life is a step that ended, an answer to a ping by an executor that has nothing to do, or the executor's own count
of work done within a step (`TellsMoves`), so that a prompt of a minute is no hang. Seconds without a sign are counted by
ticks that really happened: a process that was stopped for an hour has not seen its device hang.
"""

from __future__ import annotations

import asyncio
import time
from typing import NoReturn, Protocol, runtime_checkable

from llmd.engine.executor import Executor
from llmd.errors import ExecutorHangs

_TICK_S = 0.25
_PATIENCE = 3.0  # times the longest of the recent steps: where steps take seconds, one more second proves nothing
_FORGETTING = 0.98  # a step; the longest one is no measure for ever


@runtime_checkable
class TellsMoves(Protocol):
    """What an executor may offer besides its protocol."""

    @property
    def moves(self) -> object:
        """Anything that changes while a step gets on (layers done, say), compared with the last; read on the loop thread."""


class Pulse:
    """Signs of life of one executor. Loop thread only; told of every step, which costs two additions."""

    def __init__(self, executor: Executor, hang_timeout_s: float) -> None:
        self.num_steps = 0  # ended, well or not
        self.num_in_flight = 0
        self.stalled_s = 0.0  # without a sign
        self._executor, self._hang_timeout_s = executor, hang_timeout_s
        self._tells_moves = isinstance(executor, TellsMoves)
        self._num_echoes = 0
        self._began_s = 0.0  # when the oldest step in flight became the first in line
        self._longest_s = 0.0
        self._last_moves: object = None
        self._num_signs = self._num_moved = 0
        self._echo: asyncio.Task[float] | None = None

    # --- told by the engine

    def submitted(self, now_s: float) -> None:
        """A step is queued."""
        if not self.num_in_flight:
            self._began_s = now_s
        self.num_in_flight += 1

    def ended(self, now_s: float) -> None:
        """The oldest step in flight was answered."""
        self.num_in_flight -= 1
        self.num_steps += 1
        took_s, self._began_s = now_s - self._began_s, now_s
        self._longest_s = max(took_s, self._longest_s * _FORGETTING)

    # --- asked by others

    @property
    def num_signs(self) -> int:
        """Signs of life so far: who is told of life only on proof compares it with the last time."""
        return self.num_steps + self._num_echoes + self._num_moved

    @property
    def patience_s(self) -> float:
        """Seconds without a sign that are a hang."""
        return max(self._hang_timeout_s, _PATIENCE * self._longest_s)

    def why_not_alive(self) -> str | None:
        """None while there are signs of life."""
        if self.stalled_s <= self.patience_s:
            return None
        what = "no step ended" if self.num_in_flight else "the idle executor gave no answer"
        return f"{what} and nothing moved for {self.stalled_s:.1f} s"

    # --- the watch

    async def watch(self) -> NoReturn:
        """Look until there is no sign for too long. Raises ExecutorHangs, or EngineFailure from an executor that is gone."""
        tick_s = min(_TICK_S, self._hang_timeout_s / 4)
        last_s = time.monotonic()
        try:
            while True:
                self._ask()
                await asyncio.sleep(tick_s)
                now_s = time.monotonic()
                self.tick(min(now_s - last_s, 2 * tick_s))
                last_s = now_s
        finally:
            if self._echo is not None:
                self._echo.cancel()
                await asyncio.gather(self._echo, return_exceptions=True)

    def tick(self, elapsed_s: float) -> None:
        """So much time has passed; raises ExecutorHangs when it was too much."""
        self._count_moves()
        self._take_echo()
        if self.num_signs != self._num_signs:
            self._num_signs = self.num_signs
            self.stalled_s = 0.0
            return
        self.stalled_s += elapsed_s
        if (reason := self.why_not_alive()) is not None:
            raise ExecutorHangs(reason)

    def _ask(self) -> None:
        """One ping at a time, and only to an executor that should be able to answer at once."""
        if self._echo is None and not self.num_in_flight:
            self._echo = asyncio.ensure_future(self._executor.ping())

    def _take_echo(self) -> None:
        if self._echo is not None and self._echo.done():
            echo, self._echo = self._echo, None
            echo.result()
            self._num_echoes += 1

    def _count_moves(self) -> None:
        moves = self._executor.moves if self._tells_moves else None  # type: ignore[attr-defined]
        self._num_moved += moves != self._last_moves
        self._last_moves = moves
