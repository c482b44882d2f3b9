"""The step loop: schedule, submit, publish, commit. Two steps in flight; text is made while the device works."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

from llmd.config import CacheConfig, SchedulerConfig
from llmd.engine.executor import Executor, ExecutorInfo, LoadProgress
from llmd.engine.grammar import MaskJob
from llmd.engine.params import SamplingParams
from llmd.engine.queue import WaitingQueue
from llmd.engine.request import Request
from llmd.engine.scheduler import Scheduler, Step
from llmd.engine.step import FinishReason, SequenceDelta, StepResult
from llmd.errors import ConfigError, EngineFailure, InvalidRequest, NotReady, Overloaded

log = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A reading of the engine's counters; `_total` ones only grow, `_s` are seconds."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_blocks: int
    num_free_blocks: int
    kv_usage: float  # share of KV blocks that sequences hold
    num_steps: int
    prefix_queries: int  # tokens looked up in the prefix cache
    prefix_hits: int  # tokens found there
    num_preemptions: int
    num_prompt_tokens: int
    num_output_tokens: int
    admitted: int
    finished: int
    last_step_s: float  # seconds since a step ended
    schedule_s: float
    wait_s: float
    commit_s: float
    publish_s: float


class _InFlight(NamedTuple):
    step: Step
    result: Awaitable[StepResult]
    masks: MaskJob | None


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
    ) -> None:
        self.executor = executor
        self.failure: BaseException | None = None
        self.info: ExecutorInfo
        self._config, self._cache_config, self._waiting = scheduler_config, cache_config, waiting
        self._publish, self._on_failure = publish, on_failure
        self._random = random.Random(seed)
        self._scheduler: Scheduler
        self._task: asyncio.Task[None] | None = None
        self._work = asyncio.Event()  # something to schedule may have come
        self._drained = asyncio.Event()
        self._is_accepting = False
        self._pool = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="llmd-masks"
        )  # its thread starts with the first mask
        self._in_flight: deque[_InFlight] = deque()
        self._deltas: list[SequenceDelta] = []  # committed and not yet published
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._last_step_at = time.monotonic()
        self._prefill_rate = 0.0  # prompt tokens a second, smoothed: what a Retry-After is reckoned from
        self._times = dict.fromkeys(("schedule", "wait", "commit", "publish"), 0.0)

    # --- life

    async def start(self, report: Callable[[LoadProgress], None]) -> ExecutorInfo:
        """Load the model and begin to serve."""
        self.info = await self.executor.start(report)
        num_groups = len(self.info.kv_groups)
        capacity = self.info.num_blocks // max(num_groups, 1) * self.info.block_size
        if num_groups and capacity < self.info.max_model_len:
            raise ConfigError(
                f"the KV pool holds {capacity} tokens ({self.info.num_blocks} blocks of {self.info.block_size} over "
                f"{num_groups} groups) and one sequence may need {self.info.max_model_len}: lower max_model_len or give "
                "the pool more memory"
            )
        self._scheduler = Scheduler(self._config, self._cache_config, self.info, self._waiting)
        self._is_accepting = True
        self._last_step_at = time.monotonic()
        self._task = asyncio.create_task(self._run(), name="llmd-step-loop")
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
        await asyncio.gather(*(flight.result for flight in self._in_flight), return_exceptions=True)
        self._in_flight.clear()
        await self.executor.stop()
        self._pool.shutdown(wait=False)

    # --- requests

    def check_admission(self, num_tokens: int = 0, num_requests: int = 1) -> None:
        """Raise NotReady or Overloaded when so much more could not wait; cheap, called before a prompt is tokenized."""
        if not self._is_accepting:
            raise NotReady("the model is not taking requests")
        num_waiting, num_waiting_tokens = len(self._waiting), self._scheduler.num_waiting_tokens
        if num_waiting + num_requests > self._config.max_waiting_requests and num_waiting:
            limit = f"{num_waiting} requests are waiting (limit {self._config.max_waiting_requests})"
        elif num_waiting_tokens + num_tokens > self._config.max_waiting_tokens and num_waiting:
            limit = f"{num_waiting_tokens} prompt tokens are waiting (limit {self._config.max_waiting_tokens})"
        else:
            return
        raise Overloaded(limit, self._retry_after_s(num_waiting_tokens))

    def _retry_after_s(self, num_waiting_tokens: int) -> float:
        return min(max(num_waiting_tokens / max(self._prefill_rate, 1.0), 1.0), 60.0)

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest, Overloaded, NotReady; then nothing of it is left behind."""
        self._check(request)
        self.check_admission(len(request.prompt) * request.num_sequences, request.num_sequences)
        params = request.params
        seed = params.seed if isinstance(params, SamplingParams) else None
        self._scheduler.add(request, self._random.getrandbits(62) if seed is None else seed)
        self._work.set()

    def _check(self, request: Request) -> None:
        length, longest = len(request.prompt), self.info.max_model_len
        if length == 0:
            raise InvalidRequest("the prompt is empty", param="prompt")
        room = longest - 1 if isinstance(request.params, SamplingParams) else longest
        if length > room:
            raise InvalidRequest(
                f"the prompt has {length} tokens and the context holds {longest}, at least one of them generated",
                param="prompt",
                code="context_length_exceeded",
            )
        if not self._config.enable_chunked_prefill and length > self._config.max_num_batched_tokens:
            raise InvalidRequest(
                f"the prompt has {length} tokens and a step takes {self._config.max_num_batched_tokens}, "
                "with enable_chunked_prefill off",
                param="prompt",
            )
        if isinstance(request.params, SamplingParams):
            if not self.info.can_generate:
                raise InvalidRequest("this model gives embeddings, it generates no text", param="model")
        elif not self.info.can_pool:
            raise InvalidRequest("this model gives no embeddings", param="model")
        if min(request.prompt.token_ids) < 0 or max(request.prompt.token_ids) >= self.info.vocab_size:
            raise InvalidRequest(f"token ids must be between 0 and {self.info.vocab_size - 1}", param="prompt")
        if request.request_id in self._scheduler.requests:
            raise InvalidRequest(f"request id {request.request_id!r} is already running", param="request_id")

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
        step = self._schedule()
        if step is not None:
            self._submit(step)
        self._publish_deltas()
        if len(self._in_flight) >= MAX_STEPS_IN_FLIGHT or (self._in_flight and step is None):
            await self._commit_oldest()
        elif not self._in_flight:
            await self._idle()

    def _submit(self, step: Step) -> None:
        masks = MaskJob(self.info.vocab_size) if step.plan.masked else None
        result = self.executor.submit(step.plan, masks.bitmask if masks else None)
        self._in_flight.append(_InFlight(step, result, masks))
        self._fill_masks()

    def _fill_masks(self) -> None:
        """Start on the masks of the oldest step in flight: every token before it is known now."""
        step, _, masks = self._in_flight[0] if self._in_flight else (None, None, None)
        if step is None or masks is None or masks.is_started:
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
        self._times["schedule"] += time.perf_counter() - began
        return step

    def _publish_deltas(self) -> None:
        if not self._deltas:
            return
        began = time.perf_counter()
        deltas, self._deltas = self._deltas, []
        self._publish(deltas)
        self._times["publish"] += time.perf_counter() - began

    async def _commit_oldest(self) -> None:
        step, pending, masks = self._in_flight[0]
        began = time.perf_counter()
        try:
            result = await pending
        except EngineFailure:
            raise
        except Exception as error:  # StepFailed, or what an executor should have made one: this step's sequences end
            log.exception("step %d failed", step.plan.step_id)
            self._in_flight.popleft()
            self._deltas += self._scheduler.fail(step, f"{type(error).__name__}: the step failed")
            self._fill_masks()
            return
        self._in_flight.popleft()
        done = time.perf_counter()
        self._times["wait"] += done - began
        if masks is not None and masks.errors:  # a result is frozen: what the grammars add makes another
            failed = {step.plan.rows[step.plan.masked[index]]: message for index, message in masks.errors.items()}
            result = replace(result, errors={**result.errors, **failed})
        deltas = self._scheduler.commit(step, result)
        self._deltas += deltas
        self._fill_masks()
        self._num_output_tokens += sum(len(delta.token_ids) for delta in deltas)
        self._count(step, done - began)
        self._times["commit"] += time.perf_counter() - done
        await asyncio.sleep(0)  # HTTP has its turn even when results are always there

    def _count(self, step: Step, took_s: float) -> None:
        num_prompt = step.plan.num_tokens - step.num_decodes
        self._num_steps += 1
        self._num_prompt_tokens += num_prompt
        if num_prompt:
            rate = num_prompt / max(took_s, 1e-6)
            self._prefill_rate = rate if not self._prefill_rate else 0.9 * self._prefill_rate + 0.1 * rate
        self._last_step_at = time.monotonic()

    async def _idle(self) -> None:
        """Nothing runs and nothing can: balance the books and wait for work, or for the next deadline."""
        if not self._scheduler.requests:
            self._drained.set()
            self._balance()
        self._work.clear()
        if self._scheduler.requests:
            raise EngineFailure(f"{len(self._scheduler.requests)} requests wait and none can be scheduled")
        await self._work.wait()

    def _balance(self) -> None:
        pool = self._scheduler.kv_cache.pool
        if pool.num_free != pool.num_blocks or self._scheduler.num_admitted != self._scheduler.num_finished:
            raise EngineFailure(f"the books do not balance when idle: {pool.num_free} of {pool.num_blocks} blocks free")

    # --- the end

    def _fail(self, error: BaseException) -> None:
        log.error("the engine failed: %s", error, exc_info=error)
        self.failure = error
        self._is_accepting = False
        self._end_all(FinishReason.ERROR, "the engine failed")
        self._drained.set()
        if self._on_failure is not None:
            self._on_failure(error)

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
        pool = scheduler.kv_cache.pool if scheduler else None
        num_blocks = pool.num_blocks if pool else 0
        num_free = pool.num_free if pool else 0
        return EngineStats(
            num_running=len(scheduler.running) if scheduler else 0,
            num_waiting=len(self._waiting),
            num_waiting_tokens=scheduler.num_waiting_tokens if scheduler else 0,
            num_blocks=num_blocks,
            num_free_blocks=num_free,
            kv_usage=1 - num_free / num_blocks if num_blocks else 0.0,
            num_steps=self._num_steps,
            prefix_queries=scheduler.kv_cache.num_queried_tokens if scheduler else 0,
            prefix_hits=scheduler.kv_cache.num_hit_tokens if scheduler else 0,
            num_preemptions=scheduler.num_preemptions if scheduler else 0,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            admitted=scheduler.num_admitted if scheduler else 0,
            finished=scheduler.num_finished if scheduler else 0,
            last_step_s=time.monotonic() - self._last_step_at,
            schedule_s=self._times["schedule"],
            wait_s=self._times["wait"],
            commit_s=self._times["commit"],
            publish_s=self._times["publish"],
        )
