"""Decode steps that are recorded once for each number of rows and replayed: no Python between one kernel and the next.

A graph is the whole way from token ids to logits of steps in which every row computes one token and samples. It reads its
inputs where they lay when it was recorded, so a step copies its columns there first. How work is recorded is the device's
affair (`Capture`): native calls on a CPU, CUDA graphs on a GPU. Where something cannot be recorded the model runs as
before, and the log says why once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from llmd.engine.step import StepPlan
from llmd.model.batch import Batch
from llmd_kernels import native

log = logging.getLogger("llmd.model")

MAX_GRAPHS = 256  # those used longest ago make room


class Captured(Protocol):
    """Work that was recorded."""

    def replay(self) -> None:
        """Do it again, in the memory it had."""


class Capture(Protocol):
    """How a device records work."""

    def size(self, num_rows: int, variant: int) -> int | None:
        """Rows of the graph that serves so many; None: this variant is not recorded here."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Captured | None, str]:
        """Do the work. What it gave; how to do it again, the result in the same memory; or why that cannot be."""


class NativeCapture:
    """On a CPU: the calls of the compiled kernels, replayed by one team of threads."""

    def __init__(self) -> None:
        from llmd_kernels.replay import Pool

        self._pool = Pool()

    def size(self, num_rows: int, variant: int) -> int:
        """As the protocol says: each number has its own."""
        return num_rows

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Captured | None, str]:
        """As the protocol says."""
        from llmd_kernels.replay import Recording

        with Recording(self._pool) as recording:
            result = work()
        if recording.missed:
            return result, None, ", ".join(sorted(recording.missed))
        return result, recording, ""


def capture_for(device: torch.device, *, has_states: bool = False) -> Capture | None:
    """How this device records steps; None where it does not. A copy of a row would advance the row's recurrent state."""
    if device.type == "cuda" and not has_states:
        from llmd.model.cuda_graphs import CudaCapture

        return CudaCapture(device)
    return NativeCapture() if device.type == "cpu" and native.library() is not None else None


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: dict[str, Tensor]  # by the batch's field
    logits: Tensor
    captured: Captured


class DecodeGraphs:
    """The graphs of one model, by number of rows. The executor thread's own."""

    def __init__(self, step: Callable[[Batch], Tensor], capture: Capture | None, max_model_len: int) -> None:
        self._step = step  # from a batch to the logits of all its tokens
        self._capture = capture
        self._max_model_len = max_model_len
        self._graphs: OrderedDict[tuple[int, int], _Graph] = OrderedDict()  # by number of rows and variant
        self._refused: set[int] = set()  # variants that cannot be recorded

    def take(self, plan: StepPlan, batch: Batch, variant: int) -> bool:
        """Whether a step is of the kind that is recorded."""
        if self._capture is None or variant in self._refused or batch.max_query_len != 1 or not all(plan.samples):
            return False
        return self._capture.size(batch.num_rows, variant) is not None

    def run(self, batch: Batch, variant: int) -> Tensor:
        """The logits [R, vocab_size] of a batch that was taken; they hold until the next call.

        `variant` tells apart what layers do with the same batch: 0 is the model as it is, others have adapters in slots.
        """
        size = self._capture.size(batch.num_rows, variant) if self._capture is not None else None
        key = (size or batch.num_rows, variant)
        graph = self._graphs.get(key)
        if graph is None:
            return _first(self._record(batch, key), batch.num_rows)
        self._graphs.move_to_end(key)
        for name, target in graph.inputs.items():
            _fill(name, target, getattr(batch, name))
        graph.captured.replay()
        return _first(graph.logits, batch.num_rows)

    def clear(self) -> None:
        """Memory that the graphs know has moved."""
        self._graphs.clear()

    def _record(self, batch: Batch, key: tuple[int, int]) -> Tensor:
        assert self._capture is not None
        columns = ((field.name, getattr(batch, field.name)) for field in fields(batch))
        inputs: dict[str, Any] = {name: _padded(name, value, key[0]) for name, value in columns if isinstance(value, Tensor)}
        # What depends on lengths is read from tensors; whoever sizes something by the longest row takes the bound.
        fixed = replace(batch, **inputs, num_rows=key[0], num_tokens=key[0], max_seq_len=self._max_model_len)
        logits, captured, why_not = self._capture.record(lambda: self._step(fixed))
        if captured is None:
            self._refuse(key[1], why_not)
            return logits
        self._graphs[key] = _Graph(inputs, logits, captured)
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return logits

    def _refuse(self, variant: int, why_not: str) -> None:
        log.info("decode steps%s are not recorded: the layers use %s", " with these adapters" if variant else "", why_not)
        if len(self._refused) >= MAX_GRAPHS:
            self._refused.clear()
        self._refused.add(variant)


def _first(logits: Tensor, num_rows: int) -> Tensor:
    return logits if len(logits) == num_rows else logits[:num_rows]


def _padded(name: str, value: Tensor, size: int) -> Tensor:
    """A batch's column as a graph of `size` rows keeps it: places that are not taken repeat the last row."""
    if name == "query_start":  # one token a row, whatever the rows
        return torch.arange(size + 1, dtype=value.dtype, device=value.device)
    return torch.cat((value, value[-1:].expand(size - len(value)))) if 0 < len(value) < size else value.clone()


def _fill(name: str, target: Tensor, value: Tensor) -> None:
    """Put a step's column where its graph reads it."""
    if name == "query_start":
        return
    if len(value) == len(target):
        target.copy_(value)
    else:
        target[: len(value)].copy_(value)
        target[len(value) :].copy_(value[-1:].expand(len(target) - len(value)))
