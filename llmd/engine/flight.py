"""The flight recorder: the last steps of an engine, kept as references, made plain only when somebody asks.

A step costs the recorder one small object. What leaves the ring is folded into the rows as they stood before its first
step, so that a record tells of every row who it is, since when, and where its KV lies. Token ids and texts are kept only
where the configuration opts in; shapes, ids of requests and numbers always.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import fields
from typing import Any, NamedTuple

from llmd.engine.executor import ExecutorInfo
from llmd.engine.params import SamplingParams
from llmd.engine.sequence import Sequence
from llmd.engine.step import BlockUpdate, RowAdmit, StepPlan

FORMAT = "llmd-flight/1"

_MIN_STEPS = 4  # more than can be in flight: what leaves the ring has its result

# what params say of shapes; the others hold text or tokens
_SHAPE_PARAMS = (
    "n", "temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logprobs", "prompt_logprobs", "ignore_eos",
)  # fmt: skip
_INFO = (
    "num_blocks", "block_size", "max_num_seqs", "max_model_len", "vocab_size", "needs_whole_prompts", "can_generate",
    "device", "attention_backend",
)  # fmt: skip


class _Admitted(NamedTuple):
    """A row's sequence, without what it says."""

    row: int
    request_id: str
    seq_id: int
    num_tokens: int
    num_prompt_tokens: int
    seed: int
    params: Any
    adapter: str | None
    token_ids: Seq[int] | None


class _Row:
    """A row as it stood before the first step of the ring."""

    __slots__ = ("admitted", "tables", "token_ids")

    def __init__(self, admitted: _Admitted) -> None:
        self.admitted = admitted
        self.token_ids = list(admitted.token_ids) if admitted.token_ids is not None else None
        self.tables: dict[int, list[int]] = {}


class FlightStep:
    """One step: written by the engine as it goes."""

    __slots__ = (
        "admitted", "at_s", "block_copies", "block_updates", "commit_s", "counts", "error", "masked", "num_free_blocks",
        "num_logits", "num_preemptions", "num_running", "num_waiting", "publish_s", "released", "rows", "samples",
        "schedule_s", "starts", "step_id", "token_ids", "token_updates", "wait_s",
    )  # fmt: skip

    def __init__(self, plan: StepPlan, schedule_s: float, queue: tuple[int, int, int, int]) -> None:
        self.step_id, self.at_s, self.schedule_s = plan.step_id, time.time(), schedule_s
        self.num_running, self.num_waiting, self.num_free_blocks, self.num_preemptions = queue
        self.released, self.block_updates, self.block_copies = plan.released, plan.block_updates, plan.block_copies
        self.rows, self.starts, self.counts = plan.rows, plan.starts, plan.counts
        self.num_logits, self.samples, self.masked = plan.num_logits, plan.samples, plan.masked
        self.admitted: Seq[_Admitted] = ()
        self.token_updates: list[tuple[int, int, Seq[int] | int]] = []
        self.wait_s = self.commit_s = self.publish_s = 0.0
        self.token_ids: Seq[int] | None = None
        self.error: str | None = None


class FlightRecorder:
    """A ring of steps of one engine. Loop thread only, but for `content` of a `snapshot`."""

    def __init__(self, max_steps: int, *, with_tokens: bool = False) -> None:
        self.with_tokens = with_tokens
        self._max_steps = max(max_steps, _MIN_STEPS)
        self._steps: deque[FlightStep] = deque()
        self._rows: dict[int, _Row] = {}

    def record(self, plan: StepPlan, schedule_s: float, queue: tuple[int, int, int, int]) -> FlightStep:
        """A step is submitted. `queue`: running, waiting, free blocks, preemptions so far."""
        step = FlightStep(plan, schedule_s, queue)
        if plan.admitted:
            step.admitted = [self._admitted(admit) for admit in plan.admitted]
        if plan.token_updates:
            step.token_updates = [
                (update.row, update.first_position, update.token_ids if self.with_tokens else len(update.token_ids))
                for update in plan.token_updates
            ]
        self._steps.append(step)
        if len(self._steps) > self._max_steps:
            _fold(self._rows, self._steps.popleft())
        return step

    def _admitted(self, admit: RowAdmit) -> _Admitted:
        return _Admitted(
            admit.row, admit.request_id, admit.seq_id, len(admit.token_ids), admit.num_prompt_tokens, admit.seed,
            admit.params, admit.adapter, admit.token_ids if self.with_tokens else None,
        )  # fmt: skip

    def content(self, info: ExecutorInfo, **facts: Any) -> dict[str, Any]:
        """All of it as plain data; takes milliseconds."""
        return {
            "format": FORMAT,
            "time": time.time(),
            **facts,
            "with_tokens": self.with_tokens,
            "info": {**{name: getattr(info, name) for name in _INFO}, "num_kv_groups": info.num_block_tables},
            "rows": [_plain_row(row, self.with_tokens) for row in self._rows.values()],
            "steps": [_plain_step(step, self.with_tokens) for step in self._steps],
            "threads": thread_stacks(),
        }


def _fold(rows: dict[int, _Row], step: FlightStep) -> None:
    """The rows after a step that leaves the ring."""
    for row in step.released:
        rows.pop(row, None)
    for admitted in step.admitted:
        rows[admitted.row] = _Row(admitted)
    for update in step.block_updates:
        if (known := rows.get(update.row)) is not None:
            known.tables.setdefault(update.group, []).extend(update.block_ids)
    if step.token_ids is not None:
        _fold_tokens(rows, step)


def _fold_tokens(rows: dict[int, _Row], step: FlightStep) -> None:
    """Only where token ids are kept."""
    for row, first, token_ids in step.token_updates:
        known = rows.get(row)
        if known is not None and known.token_ids is not None and not isinstance(token_ids, int):
            known.token_ids[first:] = token_ids
    sampled = iter(step.token_ids or ())
    for row, start, count, samples in zip(step.rows, step.starts, step.counts, step.samples, strict=True):
        token_id = next(sampled, None) if samples else None
        known = rows.get(row)
        if known is not None and known.token_ids is not None and token_id is not None:
            known.token_ids[start + count :] = [token_id]


def _plain_row(row: _Row, with_tokens: bool) -> dict[str, Any]:
    plain = _plain_admitted(row.admitted, with_tokens) | {"tables": [row.tables[group] for group in sorted(row.tables)]}
    return plain | {"token_ids": row.token_ids} if with_tokens else plain


def _plain_admitted(admitted: _Admitted, with_tokens: bool) -> dict[str, Any]:
    plain = admitted._asdict() | {"params": _plain_params(admitted.params, with_tokens)}
    if not with_tokens:
        del plain["token_ids"]
    return plain


def _plain_params(params: Any, with_tokens: bool) -> dict[str, Any]:
    if not isinstance(params, SamplingParams):
        return {"pooling": params.pooling}
    names = _SHAPE_PARAMS if not with_tokens else tuple(field.name for field in fields(params))
    return {name: _plain_value(getattr(params, name)) for name in names}


def _plain_value(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None | tuple | list | dict) else repr(value)


def _plain_step(step: FlightStep, with_tokens: bool) -> dict[str, Any]:
    plain = {name: getattr(step, name) for name in FlightStep.__slots__ if name != "token_ids"}
    plain["admitted"] = [_plain_admitted(admitted, with_tokens) for admitted in step.admitted]
    plain["block_updates"] = [_plain_blocks(update) for update in step.block_updates]
    plain["block_copies"] = [list(copy) for copy in step.block_copies]
    return plain | {"token_ids": step.token_ids} if with_tokens else plain


def _plain_blocks(update: BlockUpdate) -> tuple[int, int, int, list[int]]:
    return update.row, update.group, update.first_index, list(update.block_ids)


def plain_requests(requests: Mapping[str, Seq[Sequence]]) -> list[dict[str, Any]]:
    """Every sequence that is not finished, without what it says."""
    now_s = time.monotonic()
    return [
        {
            "request_id": request_id, "index": sequence.index, "seq_id": sequence.seq_id, "state": sequence.state.value,
            "row": sequence.row, "age_s": round(now_s - sequence.request.arrival_s, 3),
            "num_prompt_tokens": sequence.num_prompt_tokens, "num_tokens": sequence.num_tokens,
            "num_computed_tokens": sequence.num_computed_tokens, "num_preemptions": sequence.num_preemptions,
        }
        for request_id, sequences in requests.items()
        for sequence in sequences
        if not sequence.is_finished
    ]  # fmt: skip


def thread_stacks() -> dict[str, list[str]]:
    """What every thread is doing now, innermost call last: `name: file:line function`."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, '?')} ({ident})": [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack(top)
        ]
        for ident, top in sys._current_frames().items()
    }
