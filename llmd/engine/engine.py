"""The step loop: schedule, submit, publish, commit. Two steps in flight; text is made while the device works."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from llmd.config import CacheConfig, HealthConfig, SchedulerConfig
from llmd.engine.adapters import AdapterStore
from llmd.engine.admission import check_request, check_room
from llmd.engine.blackbox import BlackBox
from llmd.engine.executor import Executor, ExecutorInfo, LoadProgress
from llmd.engine.flight import FlightStep, plain_requests
from llmd.engine.grammar import MaskJob
from llmd.engine.ledger import Step
from llmd.engine.memory import TokenBudget
from llmd.engine.params import SamplingParams
from llmd.engine.pulse import Pulse
from llmd.engine.queue import FairQueue, Share, WaitingQueue
from llmd.engine.request import Request
from llmd.engine.scheduler import Scheduler
from llmd.engine.sequence import Sequence
from llmd.engine.stats import Counters, EngineStats
from llmd.engine.step import FinishReason, SequenceDelta, StepResult
from llmd.errors import (
    ConfigError,
    EngineFailure,
    ExecutorHangs,
    InvalidRequest,
    NotReady,
    StepOutOfMemory,
)

log = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 2
_SLOW_STEP_S = 0.03  # from which on the loop's own work is a small part of a step
_WRITING_S = 2.0  # for a flight record before the process ends


class _InFlight(NamedTuple):
    step: Step
    result: Awaitable[StepResult]
    masks: MaskJob | None
    record: FlightStep | None


class Engine:
    """One model's scheduler and executor, driven by one task on the loop thread.

    `publish` is called once a step with the deltas of the step before; it must not raise for one sequence's sake.
    `on_failure` is called once when the executor is gone.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler_config: SchedulerConfig,
        cache_config: CacheConfig,
        *,
        waiting: WaitingQueue,
        publish: Callable[[list[SequenceDelta]], None],
        on_failure: Callable[[BaseException], None] | None = None,
        seed: int = 0,
        health: HealthConfig | None = None,
        name: str = "",
        model: str = "",
    ) -> None:
        health = health or HealthConfig()
        self.executor = executor
        self.pulse = Pulse(executor, health.hang_timeout_s)
        self.failure: BaseException | None = None
        self.info: ExecutorInfo
        self.adapter_store: AdapterStore
        self._config, self._cache_config, self._waiting = scheduler_config, cache_config, waiting
        self._publish, self._on_failure = publish, on_failure
        self._random = random.Random(seed)
        self._scheduler: Scheduler
        self._task: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._blackbox = BlackBox(health, name, model)
        self._budget = TokenBudget(scheduler_config.max_num_batched_tokens)
        self._work = asyncio.Event()  # something to schedule may have come
        self._drained = asyncio.Event()
        self._is_accepting = False
        self._pool = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="llmd-masks"
        )  # its thread starts with the first mask
        self._in_flight: deque[_InFlight] = deque()
        self._deltas: list[SequenceDelta] = []  # committed and not yet published
        self._counters = Counters()
        self._schedule_s = 0.0  # of the last step

    # --- life

    async def start(self, report: Callable[[LoadProgress], None]) -> ExecutorInfo:
        """Load the model and begin to serve."""
        self.info = await self.executor.start(report)
        num_groups = self.info.num_block_tables
        capacity = self.info.num_blocks // max(num_groups, 1) * self.info.block_size
        if num_groups and capacity < self.info.max_model_len:
            raise ConfigError(
                f"the KV pool holds {capacity} tokens ({self.info.num_blocks} blocks of {self.info.block_size} over "
                f"{num_groups} groups) and one sequence may need {self.info.max_model_len}: lower max_model_len or give "
                "the pool more memory"
            )
        self._waiting = self._blackbox.open(self._waiting, lambda: self._scheduler.running)
        self._scheduler = Scheduler(self._config, self._cache_config, self.info, self._waiting)
        self.adapter_store = AdapterStore(self.executor, self._scheduler.adapters, refuse=self._refuse, wake=self._work.set)
        self._is_accepting = True
        self._counters.last_step_at_s = time.monotonic()
        self._task = asyncio.create_task(self._run(), name="llmd-step-loop")
        self._watcher = asyncio.create_task(self._watch(), name="llmd-pulse")
        return self.info

    async def stop(self, *, drain_s: float = 0.0) -> None:
        """Take no more requests, let running ones finish for `drain_s` seconds, abort the rest, stop the executor."""
        self._is_accepting = False
        if self._task is not None:
            if drain_s > 0 and self.failure is None and self._scheduler.requests:
                self._drained.clear()
                with_timeout = asyncio.wait_for(self._drained.wait(), drain_s)
                await asyncio.gather(with_timeout, return_exceptions=True)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._end_all(FinishReason.ABORT, None)
            self._task = None
            await self.adapter_store.stop()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        for flight in self._in_flight:  # an executor that waits for masks would never answer
            if flight.masks is not None:
                flight.masks.skip(len(flight.step.plan.masked))
        self._pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(self.failure, ExecutorHangs):
            return  # nobody waits for a thread that may never return
        await asyncio.gather(*(flight.result for flight in self._in_flight), return_exceptions=True)
        self._in_flight.clear()
        await self.executor.stop()
        if self.failure is None:
            self._blackbox.close()

    # --- requests

    def check_admission(self, num_tokens: int = 0, num_requests: int = 1, key: str = "") -> None:
        """Raise NotReady or Overloaded when so much more could not wait; cheap, called before a prompt is tokenized."""
        if not self._is_accepting:
            raise NotReady("the model is not taking requests")
        num_waiting_tokens, rate = self._scheduler.num_waiting_tokens, self._counters.prefill_rate
        room = {"num_tokens": num_tokens, "num_requests": num_requests}
        check_room(self._config, self._waiting, num_waiting_tokens, rate, **room, key=key)

    def set_shares(self, shares: Mapping[str, Share]) -> None:
        """What each key is granted beside others, where the policy shares between keys."""
        if isinstance(self._waiting, FairQueue):
            self._waiting.set_shares(shares)

    def set_queue_limits(self, config: SchedulerConfig) -> None:
        """Take how much may wait from a changed configuration."""
        limits = {name: getattr(config, name) for name in ("max_waiting_requests", "max_waiting_tokens")}
        self._config = self._config.model_copy(update=limits)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return self._task is None or not self._scheduler.requests

    def replace_queue(self, config: SchedulerConfig, waiting: WaitingQueue) -> None:
        """Let sequences wait by another policy; only while idle."""
        assert self.is_idle
        taken = ("policy", "priority_aging_s", "watermark")
        self._config = self._config.model_copy(update={name: getattr(config, name) for name in taken})
        if self._task is None:
            self._waiting = waiting
            return
        self._waiting = self._blackbox.replace(waiting, lambda: self._scheduler.running)
        self._scheduler.set_queue(self._config, self._waiting)

    def add(self, request: Request) -> list[Sequence]:
        """Queue a request; its sequences, to look at. Raises InvalidRequest, Overloaded, NotReady; then nothing is left."""
        check_request(request, self.info, self._config, self._scheduler)
        if request.adapter is not None and not self.adapter_store.has(request.adapter):
            raise InvalidRequest(f"no adapter is named {request.adapter!r}", param="model")
        self._blackbox.check(request)
        self.check_admission(len(request.prompt) * request.num_sequences, request.num_sequences, request.key)
        params = request.params
        seed = params.seed if isinstance(params, SamplingParams) else None
        sequences = self._scheduler.add(request, self._random.getrandbits(62) if seed is None else seed)
        self._work.set()
        return sequences

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request; unknown and finished ones are ignored. Whoever aborts knows: no delta follows."""
        if self._task is not None and self.failure is None:
            self._scheduler.end_request(request_id, reason)
            self._work.set()

    def finish(self, request_id: str, index: int, reason: FinishReason) -> None:
        """End one sequence whose text ended it (a stop string); no delta follows."""
        for sequence in self._scheduler.requests.get(request_id, ()):
            if sequence.index == index and not sequence.is_finished:
                self._scheduler.end(sequence, reason)
                self._work.set()
                return

    # --- the loop

    async def _run(self) -> None:
        try:
            while True:
                await self._turn()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever broke, every client must hear of it and the process end
            self._fail(error)

    async def _turn(self) -> None:
        """One step planned and submitted, the text of one made, the result of one taken."""
        depth = self._depth()
        step = self._schedule() if len(self._in_flight) < depth else None
        if step is not None:
            self._submit(step)
        if self._scheduler.adapters.has_errands:  # after the step: what it puts into slots may be dropped now
            self.adapter_store.run_errands()
        self._publish_deltas()
        if not self._in_flight:
            await self._idle()
        elif step is None or len(self._in_flight) >= depth:
            await self._commit_oldest()

    def _depth(self) -> int:
        """How many steps may be in flight: one where several keys share a slow device.

        A request that comes waits for what is in flight; where a step takes long, planning the next one beside it saves
        little.
        """
        scheduler = self._scheduler
        scheduler.has_slow_steps = self._counters.step_s > _SLOW_STEP_S
        scheduler.shared_tokens = max(self._config.shared_prompt_tokens, int(self._counters.prefill_rate * _SLOW_STEP_S))
        return 1 if scheduler.has_slow_steps and scheduler.is_shared else MAX_STEPS_IN_FLIGHT

    def _submit(self, step: Step) -> None:
        masks = MaskJob(self.info.vocab_size) if step.plan.masked else None
        record = self._blackbox.submitted(step.plan, self._schedule_s, self._queue())
        self.pulse.submitted(time.monotonic())
        if not self._in_flight:
            self._counters.busy_since_s = time.monotonic()
        result = self.executor.submit(step.plan, masks.bitmask if masks else None)
        self._in_flight.append(_InFlight(step, result, masks, record))
        self._fill_masks()

    def _queue(self) -> tuple[int, int, int, int]:
        scheduler = self._scheduler
        num_free = scheduler.kv_cache.pool.num_free
        return len(scheduler.running), len(self._waiting), num_free, scheduler.num_preemptions

    def _fill_masks(self) -> None:
        """Start on the masks of the oldest step in flight: every token before it is known now."""
        if not self._in_flight:
            return
        step, _, masks, _ = self._in_flight[0]
        if masks is None or masks.is_started:
            return
        masks.is_started = True
        sequences = [step.sequences[index] for index in step.plan.masked]
        self._pool.submit(
            masks.fill, [None if entry.is_finished or entry.num_stale else entry.matcher for entry in sequences]
        )

    def _schedule(self) -> Step | None:
        began = time.perf_counter()
        now_s = time.monotonic()
        self._deltas += self._scheduler.expire(now_s)
        step = self._scheduler.schedule(now_s)
        self._schedule_s = time.perf_counter() - began
        self._counters.schedule_s += self._schedule_s
        return step

    def _publish_deltas(self) -> None:
        if not self._deltas:
            return
        began = time.perf_counter()
        deltas, self._deltas = self._deltas, []
        self._publish(deltas)
        took_s = time.perf_counter() - began
        self._counters.publish_s += took_s
        if self._in_flight and (record := self._in_flight[-1].record) is not None:
            record.publish_s = took_s

    async def _commit_oldest(self) -> None:
        step, pending, masks, record = self._in_flight[0]
        began = time.perf_counter()
        try:
            result = await pending
        except EngineFailure as error:
            _note_error(record, error)
            raise
        except StepOutOfMemory as error:
            await self._compute_again(error)
            return
        except Exception as error:  # StepFailed, or what an executor should have made one: this step's sequences end
            log.exception("step %d failed", step.plan.step_id)
            self._landed(error)
            self._deltas += self._scheduler.fail(step, f"{type(error).__name__}: the step failed")
            self._fill_masks()
            return
        self._landed()
        done = time.perf_counter()
        self._counters.wait_s += done - began
        if masks is not None and masks.errors:  # a result is frozen: what the grammars add makes another
            failed = {step.plan.rows[step.plan.masked[index]]: message for index, message in masks.errors.items()}
            result = replace(result, errors={**result.errors, **failed})
        deltas = self._scheduler.commit(step, result)
        self._deltas += deltas
        self._fill_masks()
        self._counters.count(step, result, deltas, has_waiting=len(self._waiting) > 0)
        commit_s = time.perf_counter() - done
        self._counters.commit_s += commit_s
        if record is not None:
            record.wait_s, record.commit_s = done - began, commit_s
            if self._blackbox.keeps_tokens:
                record.token_ids = result.token_ids
        if not self._budget.is_full and self._budget.succeeded():
            self._scheduler.token_budget = self._budget.tokens
        await asyncio.sleep(0)  # HTTP has its turn even when results are always there

    def _landed(self, error: BaseException | None = None) -> Step:
        """The oldest step in flight was answered."""
        flight = self._in_flight.popleft()
        self.pulse.ended(time.monotonic())
        if error is not None:
            _note_error(flight.record, error)
        return flight.step

    async def _compute_again(self, error: StepOutOfMemory) -> None:
        """A step found no memory: it, and what was planned on its result, is computed again in smaller steps."""
        steps = [self._landed(error)]
        while self._in_flight:
            self._fill_masks()
            answers = await asyncio.gather(self._in_flight[0].result, return_exceptions=True)
            if isinstance(answers[0], EngineFailure):
                raise answers[0]
            steps.append(self._landed())
        has_tried = self._budget.failed()
        self._scheduler.token_budget = self._budget.tokens
        log.warning("step %d: %s; steps of %d tokens now", steps[0].plan.step_id, error, self._budget.tokens)
        largest = max(steps[0].sequences, key=lambda sequence: len(sequence.token_ids), default=None)
        self._scheduler.roll_back(steps)
        if has_tried and largest is not None and not largest.is_finished:
            self._deltas += self._scheduler.end_one(largest, FinishReason.ERROR, "the device has no memory for this request")

    async def _idle(self) -> None:
        """Nothing runs and nothing can: balance the books and wait for work, or for the next deadline."""
        if not self._scheduler.requests:
            self._drained.set()
            self._balance()
            self._blackbox.idle()
        self._work.clear()
        until_s = None
        if self._scheduler.requests:
            if not self._scheduler.adapters.is_reading:
                raise EngineFailure(f"{len(self._scheduler.requests)} requests wait and none can be scheduled")
            until_s = self._scheduler.next_deadline_s
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._work.wait(), None if until_s is None else max(0.0, until_s - time.monotonic()))

    def _balance(self) -> None:
        pool = self._scheduler.kv_cache.pool
        if pool.num_free != pool.num_blocks or self._scheduler.num_admitted != self._scheduler.num_finished:
            raise EngineFailure(f"the books do not balance when idle: {pool.num_free} of {pool.num_blocks} blocks free")
        if not self._scheduler.adapters.is_balanced:
            raise EngineFailure("the books do not balance when idle: an adapter is held by a sequence that has ended")

    def _refuse(self, request_ids: list[str], error: str) -> None:
        """End requests that can not be served as they ask."""
        for request_id in request_ids:
            self._deltas += self._scheduler.end_request(request_id, FinishReason.REFUSED, error)

    # --- the end

    async def _watch(self) -> None:
        try:
            await self.pulse.watch()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - a hang, or an executor that is gone while nothing runs
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.failure is not None:
            return
        log.error("the engine failed: %s", error, exc_info=error)
        self.failure = error
        self._is_accepting = False
        for task in (self._task, self._watcher):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        record = self._record("hang" if isinstance(error, ExecutorHangs) else "failure", error)
        self._end_all(FinishReason.ERROR, "the engine failed")
        self._drained.set()
        if self._on_failure is not None:
            self._on_failure(error)
        writing = threading.Thread(target=self._blackbox.write, args=(record,), name="llmd-flight", daemon=True)
        writing.start()
        writing.join(_WRITING_S)  # a disk may hang too

    def _record(self, reason: str, error: BaseException | None = None) -> dict[str, Any]:
        stats = asdict(self.stats())
        requests = plain_requests(self._scheduler.requests)
        return self._blackbox.content(reason, self.info, error, stats=stats, requests=requests)

    async def dump(self, reason: str) -> Path | None:
        """Write a flight record into the state directory, if there is one; the engine goes on."""
        if self._task is None:
            return None
        return await asyncio.to_thread(self._blackbox.write, self._record(reason))

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        for request_id in list(self._scheduler.requests):
            self._deltas += self._scheduler.end_request(request_id, reason, error)
        self._publish_deltas()

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running sequences keep their blocks."""
        self._scheduler.kv_cache.pool.forget()

    def stats(self) -> EngineStats:
        """Read the counters; zeros before the model is loaded."""
        scheduler = self._scheduler if self._task is not None else None
        return self._counters.read(scheduler, num_waiting=len(self._waiting), num_out_of_memory=self._budget.num_failures)

    def adapters(self) -> tuple[frozenset[str], frozenset[str]]:
        """The adapters of running sequences, and those that only waiting ones want."""
        groups = self._scheduler.requests.values() if self._task is not None else ()
        found = [(name, entry.row) for group in groups for entry in group if (name := entry.request.adapter)]
        running = frozenset(name for name, row in found if row is not None)
        return running, frozenset(name for name, _ in found) - running


def _note_error(record: FlightStep | None, error: BaseException) -> None:
    if record is not None:
        record.error = f"{type(error).__name__}: {error}"
