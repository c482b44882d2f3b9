"""Proof that the executor thread gets on within a step or a call: what tells a long prompt from a hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_LAYER_S = 60.0  # that a CPU may work on one layer: a large prompt on few cores takes long, a loop without end longer
_CALL_S = 900.0  # that a call which is no step (loading, waking up) may take: it shows no layers


class Moves:
    """A number that changes while there is progress; written by the executor thread, read by the loop."""

    def __init__(self, num_layers_done: Callable[[], int]) -> None:
        self._num_layers_done = num_layers_done
        self._cpu_clock: int | None = None  # of the thread, where it is the thread that computes
        self._since = (0, 0.0)  # layers done when the loop last looked, and the thread's seconds of work until then
        self._call_began_s: float | None = None

    def follow_this_thread(self) -> None:
        """This thread computes the layers itself: its own work is progress too."""
        if hasattr(time, "pthread_getcpuclockid"):
            self._cpu_clock = time.pthread_getcpuclockid(threading.get_ident())

    def call(self, call: Callable[[], object]) -> object:
        """Make a call that is no step."""
        self._call_began_s = time.monotonic()
        try:
            return call()
        finally:
            self._call_began_s = None

    @property
    def number(self) -> tuple[int, int, int]:
        """Layers done, tenths of a second worked on the present one, tenths of a second of the present call: bounded."""
        num_layers = self._num_layers_done()
        return num_layers, self._worked(num_layers), self._called()

    def _worked(self, num_layers: int) -> int:
        if self._cpu_clock is None:
            return 0
        try:
            worked_s = time.clock_gettime(self._cpu_clock)
        except OSError:  # the thread has ended
            return 0
        if num_layers != self._since[0]:
            self._since = num_layers, worked_s
        return int(10 * min(worked_s - self._since[1], _LAYER_S))

    def _called(self) -> int:
        began_s = self._call_began_s
        return 0 if began_s is None else int(10 * min(time.monotonic() - began_s, _CALL_S))
