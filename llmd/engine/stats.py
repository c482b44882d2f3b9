"""What an engine counts, and a reading of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from llmd.engine.executor import ExecutorInfo
from llmd.engine.ledger import Step
from llmd.engine.roofline import read_bytes, utilization
from llmd.engine.scheduler import Scheduler
from llmd.engine.step import NONFINITE, SequenceDelta, StepResult

_RATE_S = 5.0  # over which the prefill rate is smoothed
_STEP_SHARE = 0.2  # of the last step in the smoothed time of one
_NUM_RECENT = 64  # decode steps by which the use of the memory is told
_NUM_STEP_SIZES = 18  # powers of two, the last one for all that is larger


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
    forward_s: float = 0.0  # as the executor measured it
    step_sizes: tuple[int, ...] = ()  # entry i: steps that computed more than 2**(i - 1) and at most 2**i tokens
    num_step_tokens: int = 0  # all that steps computed
    num_context_tokens: int = 0  # positions of KV that steps read, added up over their rows
    num_nonfinite: int = 0  # sequences that ended because their logits or hidden states were not finite
    num_out_of_memory: int = 0  # steps that found no memory and were computed again
    read_bytes: float = 0.0  # weights and KV that steps had to read
    memory_utilization: float | None = None  # share of the memory bandwidth of the last decode steps, where it is known


class Counters:
    """What grows with every step of an engine."""

    def __init__(self) -> None:
        self.schedule_s = self.wait_s = self.commit_s = self.publish_s = 0.0
        self.last_step_at_s = time.monotonic()
        self.busy_since_s = self.last_step_at_s  # when a step was last submitted while none was in flight
        self.step_s = 0.0  # from one result to the next while there is work, smoothed
        self.prefill_rate = 0.0  # prompt tokens a second, smoothed: what a Retry-After is reckoned from
        self._num_steps = self._num_prompt_tokens = self._num_output_tokens = 0
        self._num_step_tokens = self._num_context_tokens = self._num_nonfinite = 0
        self._step_sizes = [0] * _NUM_STEP_SIZES
        self._forward_s = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=_NUM_RECENT)  # decode steps: positions read, seconds

    def count(self, step: Step, result: StepResult, deltas: Seq[SequenceDelta], *, has_waiting: bool) -> None:
        """A step was committed."""
        num_tokens = step.plan.num_tokens
        self._num_steps += 1
        self._num_output_tokens += sum(len(delta.token_ids) for delta in deltas)
        self._count_prompts(num_tokens - step.num_decodes, has_waiting)
        self._forward_s += result.forward_s
        self._step_sizes[min((num_tokens - 1).bit_length(), _NUM_STEP_SIZES - 1)] += 1
        self._num_step_tokens += num_tokens
        num_context_tokens = sum(step.plan.starts) + num_tokens
        self._num_context_tokens += num_context_tokens
        if step.num_decodes == num_tokens:
            self._recent.append((num_context_tokens, result.forward_s))
        if result.errors:
            self._num_nonfinite += sum(delta.error in NONFINITE for delta in deltas)

    def _count_prompts(self, num_prompt: int, has_waiting: bool) -> None:
        now_s = time.monotonic()
        took_s = max(now_s - max(self.last_step_at_s, self.busy_since_s), 1e-6)
        self.step_s += _STEP_SHARE * (took_s - self.step_s)
        self._num_prompt_tokens += num_prompt
        if num_prompt or has_waiting:  # steps that compute no prompt count too while one waits
            share = min(1.0, took_s / _RATE_S) if self.prefill_rate else 1.0
            self.prefill_rate += share * (num_prompt / took_s - self.prefill_rate)
        self.last_step_at_s = now_s

    def read(self, scheduler: Scheduler | None, *, num_waiting: int, num_out_of_memory: int) -> EngineStats:
        """All of it; without a scheduler, which comes with the model, its share is zeros."""
        info = scheduler.info if scheduler else None
        pool = scheduler.kv_cache.pool if scheduler else None
        num_blocks = pool.num_blocks if pool else 0
        num_free = pool.num_free if pool else 0
        return EngineStats(
            num_running=len(scheduler.running) if scheduler else 0,
            num_waiting=num_waiting,
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
            last_step_s=time.monotonic() - self.last_step_at_s,
            schedule_s=self.schedule_s,
            wait_s=self.wait_s,
            commit_s=self.commit_s,
            publish_s=self.publish_s,
            forward_s=self._forward_s,
            step_sizes=tuple(self._step_sizes),
            num_step_tokens=self._num_step_tokens,
            num_context_tokens=self._num_context_tokens,
            num_nonfinite=self._num_nonfinite,
            num_out_of_memory=num_out_of_memory,
            read_bytes=read_bytes(info, self._num_steps, self._num_context_tokens) if info else 0.0,
            memory_utilization=self._utilization(info) if info else None,
        )

    def _utilization(self, info: ExecutorInfo) -> float | None:
        """Of the last decode steps; prompts are computed at the speed of arithmetic, not of memory."""
        seconds = sum(forward_s for _, forward_s in self._recent)
        return utilization(info, len(self._recent), sum(tokens for tokens, _ in self._recent), seconds)
