"""Host numbers on their way to a GPU and back: through pinned memory, so that no copy waits for the steps that are queued.

A copy from ordinary memory may wait until all that is queued before it has run: one such copy in a step, and two steps are
never in flight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_SLOTS = 4  # two steps are in flight; the slot of a third is not touched


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of these numbers on `device`. The copy waits for nothing; on a CPU it is none, and `array` is handed over."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host if device.type == "cpu" else pinned(host).to(device, non_blocking=True)


def to_device(values: Sequence[Any] | np.ndarray, dtype: np.dtype | type, device: torch.device) -> Tensor:
    """A fresh tensor of host numbers on `device`; the copy waits for nothing."""
    return send(np.array(values, dtype=dtype), device)


def put(target: Tensor, array: np.ndarray) -> None:
    """Write numbers over a tensor of a device; the copy waits for nothing."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    target.copy_(pinned(host) if target.device.type != "cpu" else host, non_blocking=True)


def pinned(host: Tensor) -> Tensor:
    """A copy in pinned memory, which torch takes up again once the copies out of it are done."""
    return torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host)


class Ring:
    """Pinned memory used in turn, a slot a step: by the time a slot's turn comes again, its step has ended."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        is_pinned = device.type == "cuda"
        self._slots = [torch.zeros(size, dtype=dtype, pin_memory=is_pinned) for _ in range(_SLOTS)]
        self._turn = 0

    def next(self) -> Tensor:
        """The next slot, [size]."""
        self._turn = (self._turn + 1) % _SLOTS
        return self._slots[self._turn]


class Landed(NamedTuple):
    """A copy that is on its way to the host, or there."""

    host: Tensor
    event: Any = None  # torch.cuda.Event; None where nothing need be waited for
    there: Tensor | None = None  # what it is a copy of: its memory is not to be given away meanwhile

    def wait(self) -> Tensor:
        """The copy, once it has arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.host


class Outbox:
    """Copies to the host on a stream of their own, so that the next step's kernels do not wait for them."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: Any = None

    def send(self, there: Tensor, landing: Tensor | None = None) -> Landed:
        """Start a copy behind what is queued; `landing` is pinned memory of its size. What it reads must not be written
        before `hold`."""
        if self._stream is None:
            return Landed(there if landing is None else landing.copy_(there))
        if landing is None:
            landing = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            landing.copy_(there, non_blocking=True)
        self._last = torch.cuda.Event()
        self._last.record(self._stream)
        return Landed(landing, self._last, there)

    def mark(self) -> Any:
        """An event behind what is queued, for a step that sends nothing; None on a CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def hold(self) -> None:
        """What is queued from now on runs behind the copies that were started."""
        if self._last is not None:
            torch.cuda.current_stream().wait_event(self._last)


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Work is queued on `stream`, behind what was queued here; what follows comes behind it."""
    before = torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)
