"""ThreadExecutor: one daemon thread that owns every tensor, fed through a queue by the loop thread.

loop thread      start ─► submit(plan) ─► asyncio future ◄────────────── call_soon_threadsafe
executor thread           queue ─► runner.launch ─► (next launch) ─► pending.result ─┘
"""

# ruff: noqa: E402 - import_torch goes before whatever else imports torch

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmd.model.torch_import import import_torch

import_torch()

import torch

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.executor import AdapterFacts, ExecutorInfo, LoadProgress
from llmd.engine.step import StepPlan, StepResult
from llmd.errors import EngineFailure, LlmdError, StepFailed, StepOutOfMemory
from llmd.model.bandwidth import ReadProbe, tell_roofline
from llmd.model.cpu_threads import Threads, cache_bytes, choose_threads
from llmd.model.cpu_threads import num_threads as num_threads
from llmd.model.loader import ModelParts, select_device
from llmd.model.moves import Moves
from llmd.model.out_of_memory import is_out_of_memory
from llmd.model.pending_step import PendingStep
from llmd.model.runner import Runner
from llmd_kernels import native
from llmd_kernels.machine import pin_threads

if TYPE_CHECKING:
    from llmd.engine.grammar import Bitmask

log = logging.getLogger("llmd.model")

_IDLE_S = 0.5  # without work, before anything is done that can wait
_DRIVERS_WORDS = ("CUDA error", "HIP error", "Triton Error [CUDA]", "Triton Error [HIP]")
_AFTER_FAILURE_S = 60.0  # before such work is begun again
_SMALL_MODEL_BYTES = 32 << 20  # the demo model's steps take 1.4 to 2 times as long on two threads as on one


class _Job(NamedTuple):
    """Something for the thread to do: a step, or any other call."""

    future: asyncio.Future[Any]
    call: Callable[[], Any] | None
    plan: StepPlan | None = None
    masks: Future[Bitmask] | None = None


class _Launched(NamedTuple):
    """A step whose result may still be on the device."""

    job: _Job
    pending: PendingStep


class _Stop(NamedTuple):
    """The last thing in the queue."""


class ThreadExecutor:
    """Drives one device. Implements `llmd.engine.executor.Executor`."""

    def __init__(
        self, model_config: ModelConfig, cache: CacheConfig, scheduler: SchedulerConfig, path: Path, parts: ModelParts
    ) -> None:
        self._config = model_config
        self._runner = Runner(model_config, cache, scheduler, path, parts)
        self._jobs: queue.SimpleQueue[_Job | _Stop] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: EngineFailure | None = None
        self._is_stopping = False
        self._in_hand: list[_Job] = []  # taken from the queue and not answered
        self._reader = ThreadPoolExecutor(1, "llmd-adapters", _prepare_reader)  # its thread starts with the first adapter
        self._moves = Moves(lambda: self._runner.num_layers_done)
        self._idle: deque[Callable[[], bool]] = deque()  # what can wait, a few milliseconds at a time: True once it is done
        self._busy_s = 0.0  # when the last step ended, or loading
        self._rests_until_s = 0.0  # no idle work before: some has failed

    # --- the loop thread's side

    async def start(self, report: Callable[[LoadProgress], None]) -> ExecutorInfo:
        """Load the model on the thread. `report` is called on the loop, at most so often as the loop turns."""
        loop = self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="llmd-executor", daemon=True)
        self._thread.start()
        # The first start on a machine compiles the CPU kernels: beside the loading of the weights.
        threading.Thread(target=native.library, name="llmd-kernels", daemon=True).start()

        def progress(news: LoadProgress) -> None:
            _call_soon(loop, report, news)

        return await self._submit(_Job(loop.create_future(), lambda: self._load(progress)))

    def submit(self, plan: StepPlan, masks: Future[Bitmask] | None = None) -> asyncio.Future[StepResult]:
        """Queue one step; the future raises StepFailed (this step) or EngineFailure (all of them)."""
        loop = self._loop or asyncio.get_running_loop()
        return self._submit(_Job(loop.create_future(), None, plan, masks))

    async def load_adapter(self, adapter_id: int, path: str) -> AdapterFacts:
        """Read and lay out an adapter in a thread of its own; the executor thread only takes what came of it."""
        loop = asyncio.get_running_loop()
        packed = await loop.run_in_executor(self._reader, self._runner.read_adapter, Path(path))
        await self._submit(_Job(loop.create_future(), lambda: self._runner.keep_adapter(adapter_id, packed)))
        return AdapterFacts(packed.rank, packed.num_bytes)

    def unload_adapter(self, adapter_id: int) -> None:
        """Drop the host's copy; an executor that has ended has none."""
        if self._failure is None and not self._is_stopping and self._loop is not None:
            self._submit(_Job(self._loop.create_future(), lambda: self._runner.drop_adapter(adapter_id)))

    async def ping(self) -> float:
        """Seconds until the thread answered, behind what is queued."""
        started_s = time.monotonic()
        loop = asyncio.get_running_loop()
        await self._submit(_Job(loop.create_future(), lambda: None))
        return time.monotonic() - started_s

    @property
    def moves(self) -> tuple[int, ...]:
        """Changes while a step or a call gets on: see `llmd.engine.pulse.TellsMoves`."""
        return self._moves.number

    async def stop(self) -> None:
        """Let queued steps finish, free the device, end the thread."""
        thread = self._thread
        if thread is None:
            return
        if not self._is_stopping:
            self._is_stopping = True
            self._jobs.put(_Stop())
        while thread.is_alive():  # a thread that hangs in a kernel must not block the loop
            await asyncio.sleep(0.002)
        self._thread = None
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _submit(self, job: _Job) -> asyncio.Future[Any]:
        failure = self._failure
        if failure is None and (self._is_stopping or self._thread is None or not self._thread.is_alive()):
            failure = EngineFailure("the executor is stopped")
        if failure is not None:
            job.future.set_exception(failure)
        else:
            self._jobs.put(job)
            if self._failure is not None:  # the thread ended between the question and the put
                _resolve(job.future, None, self._failure)
        return job.future

    # --- the executor thread's side

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - whatever ends this thread, those who wait must hear of it
            self._fail(EngineFailure(f"the executor thread ended: {error!r}"))
        finally:
            self._refuse_rest()
            self._runner.close()

    def _load(self, report: Callable[[LoadProgress], None]) -> ExecutorInfo:
        threads = choose_threads(self._config.cpu_threads, self._config.cpu_affinity)
        torch.set_num_threads(threads.count)
        if select_device(self._config.device).type != "cpu":
            info = self._runner.load(report)
            native.set_num_threads(threads.count)
            self._busy_s = time.monotonic()
            return info
        threads.confine()  # before this thread has a team
        info = self._runner.load(report)
        is_small = info.weights_bytes < _SMALL_MODEL_BYTES  # meeting at barriers takes longer than the work between them
        if is_small and self._config.cpu_threads is None:
            threads = Threads(1, why="the model is small")
        self._moves.follow_this_thread()
        self._settle(threads, info)
        return info

    def _settle(self, threads: Threads, info: ExecutorInfo) -> None:
        """All threads are there: each to its place. What its memory can do is measured once there is nothing to do."""
        torch.set_num_threads(threads.count)
        native.set_num_threads(threads.count)
        if threads.is_pinned:
            pin_threads(threads.cpus)
        log.info("CPU: %s", threads)
        info.facts["cpu_threads"] = threads.count
        if info.weights_bytes > max(_SMALL_MODEL_BYTES, cache_bytes()):
            self._idle.append(self._measure(info, threads.count))
            self._busy_s = time.monotonic()

    def _measure(self, info: ExecutorInfo, num_threads: int) -> Callable[[], bool]:
        """Measure the bandwidth, a slice at each call; what came of it is told on the loop, which owns the facts."""
        probe = ReadProbe()

        def advance() -> bool:
            if not probe.advance():
                return False
            if self._loop is not None and probe.bandwidth is not None:
                _call_soon(self._loop, tell_roofline, info, probe.bandwidth, num_threads)
            return True

        return advance

    def _work(self) -> None:
        """Launch steps in order. While one is on a GPU, the next is launched before its result is waited for."""
        launched: _Launched | None = None
        while not isinstance(job := self._next(wait=launched is None), _Stop):
            before, launched = launched, None
            if job is not None and job.plan is not None and self._failure is None:
                launched = self._launch(job)
            self._finish(before)
            if self._runner.is_synchronous:
                self._finish(launched)
                launched = None
            if job is not None and self._failure is not None:
                self._answer(job, error=self._failure)
            elif job is not None and job.plan is None:
                self._call(job)
        self._finish(launched)

    def _next(self, *, wait: bool) -> _Job | _Stop | None:
        """The next job; None when there is none yet and a result could be waited for, or idle work was done meanwhile."""
        if wait and not self._idle and self._runner.lacks_graphs:
            self._idle.append(self._runner.record_next)
        try:
            job = self._jobs.get(block=wait, timeout=self._until_idle_s() if wait and self._idle else None)
        except queue.Empty:
            if wait:
                self._work_idly(self._idle[0])
            return None
        if isinstance(job, _Job):
            self._in_hand.append(job)
        return job

    def _work_idly(self, advance: Callable[[], bool]) -> None:
        """Nobody waits for it, so what fails is told and left."""
        try:
            is_done = advance()
        except Exception as error:
            if is_device_lost(error):
                raise
            told = None if is_out_of_memory(error) else error
            log.warning("work in idle time failed, it is tried again later", exc_info=told)
            is_done, self._rests_until_s = True, time.monotonic() + _AFTER_FAILURE_S
        if is_done:
            self._idle.popleft()

    def _until_idle_s(self) -> float:
        return max(0.0, max(self._busy_s + _IDLE_S, self._rests_until_s) - time.monotonic())

    def _call(self, job: _Job) -> None:
        assert job.call is not None
        try:
            answer = self._moves.call(job.call)
        except LlmdError as error:
            self._answer(job, error=error)
        except Exception as error:
            log.exception("loading failed")
            self._answer(job, error=error)
        else:
            self._answer(job, answer)

    def _launch(self, job: _Job) -> _Launched | None:
        assert job.plan is not None
        try:
            return _Launched(job, self._runner.launch(job.plan, job.masks))
        except Exception as error:  # noqa: BLE001 - one step's failure must not end the others
            self._step_failed(job, error)
            return None

    def _finish(self, launched: _Launched | None) -> None:
        if launched is None:
            return
        self._busy_s = time.monotonic()
        try:
            result = launched.pending.result()
        except Exception as error:  # noqa: BLE001 - as in _launch
            self._step_failed(launched.job, error)
            return
        self._answer(launched.job, result)

    def _step_failed(self, job: _Job, error: Exception) -> None:
        """This step only, unless the device is lost."""
        lacked_memory = is_out_of_memory(error)
        if is_device_lost(error):
            log.error("the device is lost: %s", error)
            self._fail(EngineFailure(f"the device is lost: {type(error).__name__}"))
            self._answer(job, error=self._failure)
            return
        if lacked_memory:  # what the step had is free only when nothing knows of its frames any more
            error = StepOutOfMemory(f"out of memory: {type(error.with_traceback(None)).__name__}")
        self._runner.forget_step()
        if isinstance(error, StepOutOfMemory):
            log.warning("a step found no memory: it is computed again in smaller ones")
        elif not isinstance(error, StepFailed):
            log.error("a step failed", exc_info=error)
            error = StepFailed(f"the step failed: {type(error).__name__}")
        self._answer(job, error=error)

    def _fail(self, failure: EngineFailure) -> None:
        self._failure = self._failure or failure

    def _refuse_rest(self) -> None:
        """Nobody may wait for a thread that is gone."""
        failure = self._failure = self._failure or EngineFailure("the executor is stopped")
        for job in list(self._in_hand):
            self._answer(job, error=failure)
        while True:
            try:
                queued = self._jobs.get(block=False)
            except queue.Empty:
                return
            if isinstance(queued, _Job):
                self._answer(queued, error=failure)

    def _answer(self, job: _Job, answer: Any = None, error: BaseException | None = None) -> None:
        if job in self._in_hand:
            self._in_hand.remove(job)
        _resolve(job.future, answer, error)


def _prepare_reader() -> None:
    """One core for reading adapters: the others go on with the steps."""
    torch.set_num_threads(1)


def is_device_lost(error: BaseException) -> bool:
    """Whether nothing can run on the device any more: a driver's error that is not a lack of memory."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", None)
    is_torchs = accelerator_error is not None and isinstance(error, accelerator_error)
    return is_torchs or any(words in str(error) for words in _DRIVERS_WORDS)


def _resolve(future: asyncio.Future[Any], answer: Any, error: BaseException | None) -> None:
    """Resolve a future of the loop thread, unless nobody waits for it any more."""

    def resolve() -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(answer)

    _call_soon(future.get_loop(), resolve)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., Any], *arguments: Any) -> None:
    """call_soon_threadsafe; a loop that is closed has nobody left to tell."""
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:
        log.debug("the loop is closed, an answer is dropped")
