"""Jobs through the engine: many at once for whole results, or one as a stream. On the loop that the engine runs on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from llmd.engine.params import SamplingParams
from llmd.errors import InvalidRequest, Overloaded
from llmd.offline.adapters import make_ready
from llmd.offline.results import Answer, check_ended

if TYPE_CHECKING:
    from llmd.offline.jobs import Job
    from llmd.offline.loop import Progress
    from llmd.offline.outputs import RequestOutput, RequestOutputKind
    from llmd.server.generate import ModelService
    from llmd.text.stream import RequestStream

T = TypeVar("T")
_RETRY_S = 0.02  # how soon a request is offered again that found the queue full


class _Live:
    """A request that somebody reads as a stream."""

    __slots__ = ("is_aborted", "stream")

    def __init__(self) -> None:
        self.stream: RequestStream | None = None  # none yet: it waits for room in the queue
        self.is_aborted = False


class Runner:
    """Brings jobs to one model's engine, as soon as its queue has room."""

    def __init__(self, service: ModelService, max_in_flight: int) -> None:
        self._service, self.max_in_flight = service, max_in_flight
        self._ids = count()
        self._live: dict[str, _Live] = {}
        self._door = asyncio.Lock()

    def new_id(self) -> str:
        """An id for a request that its caller did not name."""
        return str(next(self._ids))

    async def run_all(
        self,
        jobs: Sequence[Job],
        finish: Callable[..., T],
        *,
        priority: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[T]:
        """What `finish` makes of each whole stream, in the jobs' order; the first error ends them all."""
        slots = asyncio.Semaphore(self.max_in_flight)
        await make_ready(self._service, [job.lora for job in jobs])

        async def run(job: Job, level: int) -> T:
            async with slots, await self._open(job, self.new_id(), level) as stream:
                deltas = await stream.collect()
            check_ended(stream, ())
            if progress is not None:
                progress.add(stream)
            return finish(self._service, stream, job, deltas)

        levels = priority or [0] * len(jobs)
        tasks = [asyncio.ensure_future(run(job, level)) for job, level in zip(jobs, levels, strict=True)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def stream(
        self, prepare: Callable[[], Awaitable[Job]], request_id: str, kind: RequestOutputKind, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of the job that `prepare` makes, as they come. Closing the iterator frees the request."""
        if request_id in self._live:
            raise InvalidRequest(f"request id {request_id!r} is already running", param="request_id")
        live = self._live[request_id] = _Live()
        try:
            job = await prepare()
            await make_ready(self._service, [job.lora])
            async with await self._open(job, request_id, priority) as stream:
                live.stream = stream
                if live.is_aborted:
                    stream.close()
                answer = Answer(self._service, stream, job, kind)
                async for deltas in stream:
                    if (output := answer.add(deltas)) is not None:
                        yield output
                if stream.is_closed:
                    yield answer.aborted()
        finally:
            del self._live[request_id]

    def abort(self, request_id: str) -> None:
        """End a streamed request: its reader gets a last output that says so. Unknown ids are ignored."""
        live = self._live.get(request_id)
        if live is not None:
            live.is_aborted = True
            if live.stream is not None and not live.stream.is_finished:
                live.stream.close()

    async def _open(self, job: Job, request_id: str, priority: int) -> RequestStream:
        if not self._door.locked():
            try:
                return await self._begin(job, request_id, priority)
            except Overloaded:
                pass  # it waits like the others, below
        async with self._door:  # one asks again and again, the others stand behind it
            while True:
                try:
                    return await self._begin(job, request_id, priority)
                except Overloaded:
                    await asyncio.sleep(_RETRY_S)

    async def _begin(self, job: Job, request_id: str, priority: int) -> RequestStream:
        options: dict[str, Any] = {"request_id": request_id, "priority": priority, "cache_salt": job.cache_salt}
        options["adapter"] = job.lora.name if job.lora is not None else None
        if isinstance(job.params, SamplingParams):
            return await self._service.generate(job.prompt.token_ids, job.params, clip_max_tokens=True, **options)
        return await self._service.embed(job.prompt, job.params, **options)
