"""What happens while a model loads: blocking work beside the loop, a bar in the terminal, the first token, the clock."""

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
from typing import TYPE_CHECKING, Any, TypeVar

from llmd.engine.executor import LoadProgress
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.request import WARM_UP
from llmd.engine.step import FinishReason
from llmd.errors import EngineFailure, ExecutorHangs

if TYPE_CHECKING:
    from llmd.server.generate import ModelService

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


async def warm_up(service: ModelService) -> None:
    """Have the model answer once, through all that a request goes through: whoever is told "ready" relies on that.

    Raises EngineFailure when it cannot, ExecutorHangs when it never does.
    """
    text_ids = service.tokenizer.encode("Hello", add_special_tokens=True)[: max(1, service.max_model_len - 1)]
    prompt = [token_id for token_id in text_ids if token_id < service.vocab_size] or [0]
    request_id = f"{WARM_UP}{service.names[0]}"
    if service.engine.info.can_generate:
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        stream = await service.generate(prompt, params, request_id=request_id)
    else:
        task = "classify" if service.pooling.labels else "embed"
        stream = await service.embed(prompt, PoolingParams(task=task), request_id=request_id)
    async with stream:
        answers = await stream.collect()
    for answer in answers:
        if answer.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            if isinstance(service.engine.failure, ExecutorHangs):
                raise service.engine.failure
            reason = service.engine.failure or answer.error or "no reason given"
            raise EngineFailure(f"{service.names[0]}: the model was loaded and cannot answer: {reason}")


def seconds_since_start() -> float:
    """How long this process has lived, interpreter start included where the system tells."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.perf_counter()
