"""What happens while a model loads: blocking work beside the loop, a bar in the terminal, the clock since the start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llmd.engine.executor import LoadProgress

log = logging.getLogger("llmd.daemon")

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """Run blocking work in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is awaited
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop may have ended meanwhile
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="llmd-load", daemon=True).start()
    return await future


class Bar:
    """A progress bar in the terminal, or a log line at each new phase where there is none."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._phase = ""
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=100, desc=name, unit="%", bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}")

    def show(self, progress: LoadProgress) -> None:
        """Draw where loading stands."""
        if self._bar is not None:
            self._bar.set_description_str(f"{self._name}: {progress.phase}", refresh=False)
            self._bar.update(max(0.0, progress.fraction * 100 - self._bar.n))
        elif progress.phase != self._phase:
            log.debug("%s: %s (%.0f %%)", self._name, progress.phase, progress.fraction * 100)
        self._phase = progress.phase

    def close(self) -> None:
        """Leave the line as it is."""
        if self._bar is not None:
            self._bar.close()


def seconds_since_start() -> float:
    """How long this process has lived, interpreter start included where the system tells."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.perf_counter()
