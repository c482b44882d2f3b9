"""Decode steps that are recorded once for each number of rows and replayed: no Python between one kernel and the next.

A graph is the whole way from the rows to logits of steps in which every row computes one token and samples. It reads its
inputs where they always lie (batch.DecodeColumns). How work is recorded is the device's affair (`Capture`): native calls on
a CPU, CUDA graphs on a GPU. Where something cannot be recorded the model runs as before, and the log says why once.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llmd.engine.step import StepPlan
from llmd.model.batch import Batch, DecodeColumns
from llmd_kernels import native

log = logging.getLogger("llmd.model")

MAX_GRAPHS = 256  # those used longest ago make room
_MOST_PADDING = 2  # a graph of so many times the rows serves until their own is recorded
_PATIENCE = 64  # steps that do with another size, or none, before recording theirs is worth a pause
LATER_S = 60.0  # before what found no memory is tried again
_ANY = 0  # instead of a size: none of a variant can be recorded

_NOTHING = StepPlan(step_id=-1)


class Captured(Protocol):
    """Work that was recorded."""

    def replay(self) -> None:
        """Do it again, in the memory it had."""


class Capture(Protocol):
    """How a device records work."""

    is_free: bool  # a step may be recorded as it runs: it takes hardly longer than without

    def sizes(self, max_num_rows: int) -> tuple[int, ...]:
        """The numbers of rows that graphs are for, rising, up to the largest."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Captured | None, str]:
        """Do the work. What it gave; how to do it again, the result in the same memory; or why that cannot be, "" for a
        lack of memory that may pass."""


class NativeCapture:
    """On a CPU: the calls of the compiled kernels, replayed by one team of threads."""

    is_free = True

    def __init__(self) -> None:
        from llmd_kernels.replay import Pool

        self._pool = Pool()

    def sizes(self, max_num_rows: int) -> tuple[int, ...]:
        """As the protocol says: each number has its own."""
        return tuple(range(1, max_num_rows + 1))

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Captured | None, str]:
        """As the protocol says."""
        from llmd_kernels.replay import Recording

        with Recording(self._pool) as recording:
            result = work()
        if recording.missed:
            return result, None, ", ".join(sorted(recording.missed))
        return result, recording, ""


def capture_for(device: torch.device) -> Capture | None:
    """How this device records steps; None where it does not."""
    if device.type == "cuda":
        from llmd.model.cuda_graphs import CudaCapture

        return CudaCapture(device)
    return NativeCapture() if device.type == "cpu" and native.library() is not None else None


class Key(NamedTuple):
    """What a graph is for. Variants tell apart what layers do with the same rows: 0 is the model as it is."""

    size: int
    variant: int


class Recorded(NamedTuple):
    """What a recorded step left; places behind the plan's rows mean nothing."""

    key: Key
    batch: Batch  # as the layers saw it
    num_tokens: Tensor  # [size] int64: what each row has now
    logits: Tensor  # [size, vocab_size]; they hold until the next step


@dataclass(frozen=True, slots=True)
class _Graph:
    logits: Tensor
    captured: Captured


class DecodeGraphs:
    """The graphs of one model. The executor thread's own."""

    def __init__(
        self, step: Callable[[Batch], Tensor], columns: DecodeColumns, capture: Capture | None, max_num_rows: int
    ) -> None:
        self._step = step  # from a batch to the logits of all its tokens
        self._columns = columns
        self._capture = capture
        self._is_dear = capture is not None and not capture.is_free  # sizes serve smaller steps, and are recorded ahead
        self._sizes = capture.sizes(max_num_rows) if capture is not None else ()
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._wanted: Counter[Key] = Counter()  # by steps that did without
        self._refused: set[Key] = set()
        self._later: dict[Key, float] = {}  # what found no memory, and when it is tried again
        self._home: Tensor | None = None  # where all graphs put their logits, on a GPU: each its own would be gigabytes

    def choose(self, plan: StepPlan, variant: int | None) -> Key | None:
        """The graph for a step: there already, or to be recorded with it; None where the step must do without one."""
        if not self._sizes or variant is None or max(plan.counts) != 1 or not all(plan.samples):
            return None
        key = Key(self._sizes[bisect_left(self._sizes, len(plan.rows))], variant)
        if key in self._graphs:
            return key
        if self._is_refused(key):
            return self._larger(key)
        if self._is_dear:
            self._wanted[key] += 1
            if self._wanted[key] < _PATIENCE:
                return self._larger(key)
        return key

    def run(self, plan: StepPlan, key: Key) -> Recorded:
        """Run a step by the graph that was chosen for it."""
        self._columns.write(plan, key.size)
        graph = self._graphs.get(key)
        if graph is None:
            return self._recorded(key, self._record(key))
        self._graphs.move_to_end(key)
        graph.captured.replay()
        return self._recorded(key, graph.logits)

    def lacking(self, variant: int) -> Key | None:
        """What is worth to be recorded while there is nothing else to do: what steps wanted, then whatever may come."""
        if not self._is_dear:
            return None
        self._wanted = Counter({key: count for key, count in self._wanted.items() if key.variant in (0, variant)})
        candidates = [key for key, _ in self._wanted.most_common()] + [Key(size, 0) for size in reversed(self._sizes)]
        return next((key for key in candidates if key not in self._graphs and not self._is_refused(key)), None)

    def first_sizes(self) -> tuple[int, ...]:
        """Those that are recorded before anything is served: with padding they serve every step. The largest comes first,
        and the others find room in the memory it took."""
        if not self._is_dear:
            return ()
        common = {size for size in self._sizes if size & (size - 1) == 0} | {self._sizes[-1]}
        return tuple(sorted(common, reverse=True))

    @property
    def num_bytes(self) -> int:
        """What graphs took of a GPU's memory so far, those that are gone included."""
        return getattr(self._capture, "num_bytes", 0)

    @property
    def num_recorded(self) -> int:
        """How many there are."""
        return len(self._graphs)

    @property
    def num_sizes(self) -> int:
        """How many there will be without adapters."""
        return len(self._sizes)

    def record(self, key: Key) -> None:
        """Record a graph by a step of spare lines."""
        self._columns.write(_NOTHING, key.size)
        self._record(key)

    def clear(self) -> None:
        """Memory that the graphs know has moved."""
        self._graphs.clear()

    def _recorded(self, key: Key, logits: Tensor) -> Recorded:
        return Recorded(key, self._columns.batch(key.size), self._columns.num_tokens(key.size), logits)

    def _larger(self, key: Key) -> Key | None:
        """Another graph that serves meanwhile."""
        sizes = (size for size in self._sizes if key.size < size <= _MOST_PADDING * key.size)
        return next((other for size in sizes if (other := Key(size, key.variant)) in self._graphs), None)

    def _record(self, key: Key) -> Tensor:
        assert self._capture is not None
        batch = self._columns.batch(key.size)

        def work() -> Tensor:
            self._columns.prepare(key.size)
            logits = self._step(batch)
            return self._at_home(logits) if self._is_dear else logits

        logits, captured, why_not = self._capture.record(work)
        self._wanted.pop(key, None)
        if captured is None:
            self._refuse(key, why_not)
            return logits
        self._forget_old(key.variant)
        self._graphs[key] = _Graph(logits, captured)
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return logits

    def _at_home(self, logits: Tensor) -> Tensor:
        if self._home is None:  # before the first capture: work is done once before it is recorded
            self._home = logits.new_empty(self._sizes[-1], logits.shape[1])
        return self._home[: len(logits)].copy_(logits)

    def _forget_old(self, variant: int) -> None:
        """What slots hold has changed: graphs of what they held before will not be asked for."""
        for key in [key for key in self._graphs if variant and key.variant not in (0, variant)]:
            del self._graphs[key]

    def _is_refused(self, key: Key) -> bool:
        if self._later and self._later.get(key, 0.0) > time.monotonic():
            return True
        return bool(self._refused) and (key in self._refused or Key(_ANY, key.variant) in self._refused)

    def _refuse(self, key: Key, why_not: str) -> None:
        """The size alone where others of its variant are there, and for a while where memory lacks."""
        if not why_not:
            self._later[key] = time.monotonic() + LATER_S
            log.warning("no memory is left for the graph of decode steps of %d rows; it is tried again later", key.size)
            return
        has_others = any(known.variant == key.variant for known in self._graphs)
        what = f" of {key.size} rows" if has_others else ""
        adapters = " with these adapters" if key.variant else ""
        log.info("decode steps%s%s are not recorded: the layers use %s", what, adapters, why_not)
        if len(self._refused) >= MAX_GRAPHS:
            self._refused.clear()
        self._refused.add(key if has_others else Key(_ANY, key.variant))
