"""What LLM runs on: an event loop in a thread, and a progress bar."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from llmd.text.stream import RequestStream

T = TypeVar("T")

_CLEANUP_S = 30.0  # how long an interrupted call waits until its requests are aborted


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmd-loop", daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether this is the loop's own thread."""
        return threading.current_thread() is self._thread

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end and return its result; Ctrl-C here cancels it, waits for its cleanup and goes on up."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("this LLM has been shut down")
        future = asyncio.run_coroutine_threadsafe(self._watched(work, done := threading.Event()), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            done.wait(_CLEANUP_S)
            raise

    async def _watched(self, work: Coroutine[Any, Any, T], done: threading.Event) -> T:
        try:
            return await work
        finally:
            done.set()

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """What `items` yields, made on the loop as it is asked for; closing the iterator closes `items`."""
        try:
            while (item := self.call(_next_of(items))) is not None:
                yield item
        finally:
            self._close(items)

    def _close(self, items: AsyncGenerator[Any, None]) -> None:
        if self._loop.is_closed():  # which ended them too
            return
        if self.is_current:  # collected as garbage on the loop's own thread, which cannot wait for itself
            self._loop.create_task(_closed(items))
        else:
            self.call(_closed(items))

    def stop(self) -> None:
        """End what still runs on the loop, the loop and its thread."""
        if self._thread.is_alive():
            self.call(_end_others())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _next_of(items: AsyncGenerator[T, None]) -> T | None:
    return await anext(items, None)


async def _closed(items: AsyncGenerator[Any, None]) -> None:
    await items.aclose()


async def _end_others() -> None:
    """Whoever waits for something here hears that it was cancelled, instead of waiting for ever."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


class Progress:
    """A bar over the prompts with tokens a second, or nothing."""

    def __init__(self, use_tqdm: bool | Callable[..., Any], num_prompts: int) -> None:
        self._bar: Any = None
        self._num_prompt_tokens = self._num_output_tokens = 0
        if use_tqdm:
            from tqdm.auto import tqdm

            make = use_tqdm if callable(use_tqdm) else tqdm
            self._bar = make(total=num_prompts, desc="Processed prompts", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, stream: RequestStream) -> None:
        """One more is done."""
        if self._bar is None:
            return
        self._num_prompt_tokens += len(stream.request.prompt)
        self._num_output_tokens += stream.num_output_tokens
        elapsed_s = self._bar.format_dict["elapsed"] or 1e-9
        speed_in, speed_out = self._num_prompt_tokens / elapsed_s, self._num_output_tokens / elapsed_s
        self._bar.set_postfix_str(f"in {speed_in:.1f} tok/s, out {speed_out:.1f} tok/s", refresh=False)
        self._bar.update(1)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
