"""Weights on their way to a GPU: several threads read, the device copies meanwhile, and nobody waits for a copy.

    files ─► chunks, in the order of the files ─► a ring of pinned buffers ─► a tensor on the device ─► its slot
             a thread for each                    copies that are only queued   cut, cast and placed there

A copy out of pageable memory waits for the device and passes through one small buffer of the driver's. Here a buffer is read
into again once the event after its last copy has passed, which is the reading thread's affair. Host memory is bounded by
the ring; on the device lies one tensor more than the weights.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmd.errors import ModelError

_CHUNK_BYTES = 16 << 20  # 3 ms of one thread's reading, 0.3 ms of a bus
_MAX_THREADS = 8  # together they read faster than disks
_SPARE_BUFFERS = 2  # that the device copies from while every thread reads
_GAP_BYTES = 256 << 10  # between tensors, read along


class TensorPlace(NamedTuple):
    """Where a tensor's bytes lie in a file, just as they will be used."""

    name: str
    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    phase: str = "weights"  # of loading, in words

    @property
    def end(self) -> int:
        """Where the next may begin."""
        return self.start + torch.Size(self.shape).numel() * self.dtype.itemsize


class _Chunk(NamedTuple):
    path: Path
    start: int
    end: int


class _Reading(NamedTuple):
    """A chunk on its way into a buffer, and how many of its bytes there were."""

    chunk: _Chunk
    buffer: int
    num_bytes: Future[int]


def can_stream(device: torch.device) -> bool:
    """Whether weights go to a device this way."""
    return device.type == "cuda" and hasattr(os, "preadv")


class DeviceStream:
    """A ring of buffers and the threads that read into it."""

    def __init__(self, device: torch.device, *, num_threads: int | None = None, chunk_bytes: int = _CHUNK_BYTES) -> None:
        self._device = device
        num_threads = num_threads or min(_MAX_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(num_threads, "llmd-read")
        self._chunk_bytes = chunk_bytes
        self._buffers = [
            torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            for _ in range(num_threads + _SPARE_BUFFERS)
        ]
        self._events: list[Any] = [None] * len(self._buffers)  # that pass when the device has copied what was there
        self._next = 0

    def __enter__(self) -> DeviceStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; what is queued on the device goes on, torch keeps its memory as long."""
        self._threads.shutdown(cancel_futures=True)
        self._buffers = []

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host, on the device; the host's may be changed afterwards."""
        if not tensor.is_cpu or not tensor.numel():
            return tensor.to(self._device)
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        target = self._empty(flat.numel())
        for start in range(0, flat.numel(), self._chunk_bytes):
            index = self._take()
            self._wait(index)
            part = flat[start : start + self._chunk_bytes]
            staged = self._buffers[index][: part.numel()].copy_(part)
            target[start : start + part.numel()].copy_(staged, non_blocking=True)
            self._mark(index)
        return target.view(tensor.dtype).view(tensor.shape)

    def read(self, places: Sequence[TensorPlace]) -> Iterator[tuple[str, torch.Tensor, str]]:
        """(name, tensor on the device, phase) of each place, in the same order.

        Raises ModelError, which names file and tensor, for what cannot be read.
        """
        with contextlib.ExitStack() as files, _Ahead(self, _chunks(places, self._chunk_bytes), files) as ahead:
            for place in places:
                target = self._empty(place.end - place.start)
                for start, source in ahead.pieces(place):
                    target[start : start + source.numel()].copy_(source, non_blocking=True)
                yield place.name, target.view(place.dtype).view(place.shape), place.phase
                del target

    # --- buffers

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _take(self) -> int:
        """The buffer that was used longest ago."""
        index, self._next = self._next, (self._next + 1) % len(self._buffers)
        return index

    def _wait(self, index: int) -> None:
        """Until the device has what was in a buffer."""
        if self._events[index] is not None:
            self._events[index].synchronize()

    def _mark(self, index: int) -> None:
        """All copies from a buffer are queued."""
        if self._device.type == "cuda":
            self._events[index] = self._events[index] or torch.cuda.Event(blocking=True)
            self._events[index].record(torch.cuda.current_stream(self._device))


class _Ahead:
    """Chunks that are read ahead, as many as there are buffers, and given up in their order."""

    def __init__(self, stream: DeviceStream, chunks: Iterator[_Chunk], files: contextlib.ExitStack) -> None:
        self._stream, self._chunks, self._files = stream, chunks, files
        self._descriptors: dict[Path, int] = {}
        self._readings: deque[_Reading] = deque()

    def __enter__(self) -> _Ahead:
        for _ in self._stream._buffers:
            self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody reads into a buffer, or from a file, that is not there any more."""
        for reading in self._readings:
            if not reading.num_bytes.cancel():
                reading.num_bytes.exception()
            self._stream._mark(reading.buffer)
        self._readings.clear()

    def pieces(self, place: TensorPlace) -> Iterator[tuple[int, torch.Tensor]]:
        """(offset in the tensor, bytes in a buffer), until the tensor is whole; each is good until the next is asked for."""
        at = place.start
        while at < place.end:
            reading = self._reading_of(place, at)
            chunk, end = reading.chunk, min(place.end, reading.chunk.end)
            if chunk.start + _count_of(reading, place) < end:
                raise ModelError(f"{place.path.name} was cut while it was read: tensor {place.name} is not whole")
            yield at - place.start, self._stream._buffers[reading.buffer][at - chunk.start : end - chunk.start]
            at = end

    def _reading_of(self, place: TensorPlace, at: int) -> _Reading:
        """What holds a byte; whatever lies before it is done with."""
        while not _holds(self._readings[0].chunk, place, at):
            reading = self._readings.popleft()
            reading.num_bytes.exception()  # what lies in a gap nobody waited for, and a buffer has one thread at a time
            self._stream._mark(reading.buffer)
            self._begin()
        return self._readings[0]

    def _begin(self) -> None:
        """Read the next chunk, if there is one, into the buffer that was given up."""
        if (chunk := next(self._chunks, None)) is not None:
            index = self._stream._take()
            job = self._stream._threads.submit(self._fill, index, self._descriptor(chunk.path), chunk)
            self._readings.append(_Reading(chunk, index, job))

    def _fill(self, index: int, descriptor: int, chunk: _Chunk) -> int:
        """On a reading thread."""
        self._stream._wait(index)
        into = memoryview(self._stream._buffers[index].numpy().data)[: chunk.end - chunk.start]
        while into and (count := os.preadv(descriptor, [into], chunk.end - len(into))):
            into = into[count:]
        return chunk.end - chunk.start - len(into)

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = self._files.enter_context(path.open("rb", buffering=0)).fileno()
        return self._descriptors[path]


def _holds(chunk: _Chunk, place: TensorPlace, at: int) -> bool:
    return chunk.path == place.path and chunk.start <= at < chunk.end


def _count_of(reading: _Reading, place: TensorPlace) -> int:
    try:
        return reading.num_bytes.result()
    except OSError as error:
        raise ModelError(f"{place.path.name}: tensor {place.name} cannot be read: {error}") from None


def _chunks(places: Iterable[TensorPlace], most: int) -> Iterator[_Chunk]:
    """What is read at once: at most so many bytes, neighbouring tensors together."""
    for run in _runs(places):
        for start in range(run.start, run.end, most):
            yield run._replace(start=start, end=min(run.end, start + most))


def _runs(places: Iterable[TensorPlace]) -> Iterator[_Chunk]:
    """Ranges of files without wide gaps, as the places follow one another."""
    run: _Chunk | None = None
    for place in places:
        if place.start == place.end:
            continue
        if run is not None and run.path == place.path and 0 <= place.start - run.end <= _GAP_BYTES:
            run = run._replace(end=place.end)
            continue
        if run is not None:
            yield run
        run = _Chunk(place.path, place.start, place.end)
    if run is not None:
        yield run
