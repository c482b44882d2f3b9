"""Every kernel that a model will launch on a device, compiled before it is needed: in parallel, and with no such device.

A Runner is loaded without weights on a device that only compiles (see dry_device) and given the steps that a server sees:
prompts, one row to as many as there may be, tokens that are chosen, drawn, cut, penalized, told with their
probabilities. What its launches ask for goes to threads (Triton lets go of Python's lock while it lowers and assembles) and
ends up in Triton's cache, under the keys that the same launches on the real device will look up.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.step import AdapterLoad, BlockUpdate, RowAdmit, StepPlan
from llmd.errors import ModelError
from llmd.model.adapter_packing import pack
from llmd.model.adapter_slots import AdapterTable
from llmd.model.adapters import Adapter, LowRank
from llmd.model.batch import Batch
from llmd.model.dry_device import dry_device
from llmd.model.gpu_target import GpuTarget
from llmd.model.layers import WeightSlot
from llmd.model.loader import ModelParts, open_checkpoint
from llmd.model.runner import Runner
from llmd.model.weight_names import TensorInfo

log = logging.getLogger("llmd.model")

_POOL_BYTES = 40 << 30  # of tensors without memory; where there is much of it, kernels must count in 64 bits
_PROMPT = 64  # tokens
_ODD = (3, 5)  # numbers of rows that are multiples of nothing
_TOKENS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {},
    {"top_k": 20},
    {"top_p": 0.9},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0.0, "logit_bias": {1: 1.0}},
    {"temperature": 0.0, "presence_penalty": 0.5, "logit_bias": {1: 1.0}},
    {"temperature": 0.0, "logprobs": 1},
)  # fmt: skip

_GREEDY = SamplingParams(temperature=0.0, max_tokens=2)
_LOGPROBS = (0, 2, 4, 8, 20)  # whose kernels hang on the number of tokens, not on that of rows


class Compiled(NamedTuple):
    """What came of it."""

    num_compiled: int
    num_known: int  # were in the cache already
    seconds: float
    failures: tuple[str, ...]  # kernels that cannot be compiled, with the reasons


class _Counter:
    """Triton's listener: called by every thread that compiles."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num = {True: 0, False: 0}

    def __call__(self, *, cache_hit: bool, **_: Any) -> None:
        with self._lock:
            self.num[cache_hit] += 1


class _DryCheckpoint:
    """Tensors as a checkpoint has them, without their numbers."""

    def __init__(self, infos: Mapping[str, TensorInfo] | None) -> None:
        self._infos = infos

    def infos(self) -> Mapping[str, TensorInfo] | None:
        """As the checkpoint tells; None where the weights are not here."""
        return self._infos

    def tensors(self, wanted: Mapping[str, WeightSlot]) -> Iterator[tuple[str, torch.Tensor, str]]:
        """Each wanted tensor, on the device."""
        for name, slot in wanted.items():
            shape, dtype = slot.shape, slot.dtype or torch.float32
            if self._infos is not None:
                shape, dtype = self._infos[name].shape, getattr(torch, self._infos[name].dtype)
            yield name, torch.empty([max(0, size) for size in shape], dtype=dtype, device="cuda"), "no weights"

    def close(self) -> None:
        """Nothing is open."""


def compile_kernels(
    model: ModelConfig,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    path: Path,
    parts: ModelParts,
    target: GpuTarget,
    *,
    num_threads: int | None = None,
    started: Callable[[], None] = lambda: None,
) -> Compiled:
    """Compile for `target` what the model in `path` launches there.

    started: called when the kernels of a start are compiled, those of the first prompt and token; others follow.
    Raises ModelError for a model that cannot be served.
    """
    begin_s = time.perf_counter()
    counter = _Counter()
    failures: list[str] = []
    with _listening(counter), dry_device(target), ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        with _compiling(pool, failures):
            runner = _load(model, cache, scheduler, path, parts)
        started()
        with _compiling(pool, failures):
            _Client(runner, scheduler.max_num_seqs, failures).ask()
    num = counter.num
    return Compiled(num[False], num[True], time.perf_counter() - begin_s, tuple(dict.fromkeys(failures)))


def _load(model: ModelConfig, cache: CacheConfig, scheduler: SchedulerConfig, path: Path, parts: ModelParts) -> Runner:
    """A Runner that has warmed up as each does at its start."""
    checkpoint = _DryCheckpoint(_infos(model, path, parts))
    spec = SimpleNamespace(detect=lambda folder: True, build=lambda folder, config: checkpoint, order=0)
    parts = replace(parts, checkpoint_formats={"none": spec})
    model = model.model_copy(update={"device": "cuda", "load_format": "none", "merge_adapter": None})
    runner = Runner(model, cache.model_copy(update={"kv_cache_bytes": _POOL_BYTES}), scheduler, path, parts)
    runner.load(lambda progress: None)
    return runner


def _infos(model: ModelConfig, path: Path, parts: ModelParts) -> Mapping[str, TensorInfo] | None:
    """What the checkpoint holds; an image may be built without its weights."""
    if model.load_format == "auto" and not any(spec.detect(path) for spec in parts.checkpoint_formats.values()):
        return None
    try:
        checkpoint = open_checkpoint(model, path, parts)
    except ModelError as error:  # an index without its shards
        log.info("kernels are compiled for what config.json says: %s", error)
        return None
    try:
        return checkpoint.infos()
    finally:
        checkpoint.close()


class _Client:
    """Asks a Runner for steps of every number of rows and kind that kernels are made for."""

    def __init__(self, runner: Runner, most_rows: int, failures: list[str]) -> None:
        self._runner, self._failures = runner, failures
        self._sizes = sorted({most_rows, *(size for size in (*_ODD, *(1 << bit for bit in range(17))) if size <= most_rows)})
        self._count = max(1, min(_PROMPT, runner.max_model_len - 2))
        self._slot: int | None = None  # of the adapter that rows use

    def ask(self) -> None:
        """For all of it."""
        if not self._runner.can_generate:
            self._take([self._count], PoolingParams())
            return
        self._ask_layers()
        self._ask_sampler()
        if (adapters := self._runner.adapters).num_slots:
            assert isinstance(adapters, AdapterTable)
            self._runner.keep_adapter(0, pack(_zeros(adapters), adapters))
            self._step(StepPlan(step_id=0, adapter_loads=[AdapterLoad(0, 0)]))
            self._slot = 0
            self._ask_layers()

    def _ask_layers(self) -> None:
        """Prompts beside tokens, and whatever graphs there may be."""
        for size in self._sizes:
            self._take([self._count, *[1] * (size - 1)], _GREEDY)
        while not self._runner.record_next():
            log.debug("a decode step was recorded")

    def _ask_sampler(self) -> None:
        """Each kind of token, in steps with prompts and without; what layers give it is known by now."""
        size, dtype = self._runner.model.config.hidden_size, self._runner.model.dtype

        def forward(batch: Batch) -> torch.Tensor:
            return torch.empty(batch.num_tokens, size, dtype=dtype, device="cuda")

        with mock.patch.object(self._runner, "forward", forward):
            for rows in self._sizes:
                for wanted in _TOKENS:
                    self._take([2] * rows, SamplingParams(max_tokens=2, **wanted))
            for num_top in _LOGPROBS:
                self._take([2], SamplingParams(temperature=0.0, max_tokens=2, logprobs=num_top))

    def _take(self, counts: Sequence[int], params: SamplingParams | PoolingParams) -> None:
        """Rows come, compute the last so many tokens of a prompt, then one more each, and go."""
        runner, rows = self._runner, list(range(len(counts)))
        generates = isinstance(params, SamplingParams)
        columns: dict[str, Any] = {
            "rows": rows,
            "num_logits": [int(generates)] * len(rows),
            "samples": [generates] * len(rows),
        }
        blocks = range(-(-(self._count + 1) // runner.rows.block_size))
        admitted = [
            RowAdmit(
                row=row, seq_id=row, request_id="", token_ids=(0,) * self._count, num_prompt_tokens=self._count,
                params=params, seed=0, adapter=None if self._slot is None else "", adapter_slot=self._slot,
            )
            for row in rows
        ]  # fmt: skip
        updates = [BlockUpdate(row, 0, 0, blocks) for row in rows] if runner.num_blocks else []
        starts = [self._count - count for count in counts]
        self._step(StepPlan(step_id=1, admitted=admitted, block_updates=updates, starts=starts, counts=counts, **columns))
        if generates:
            self._step(StepPlan(step_id=2, starts=[self._count] * len(rows), counts=[1] * len(rows), **columns))
        self._step(StepPlan(step_id=3, released=rows))

    def _step(self, plan: StepPlan) -> None:
        """What cannot be launched here is compiled when it is launched for once."""
        try:
            self._runner.run(plan)
        except Exception as error:  # noqa: BLE001 - of plugins as well: the real device will tell whether it is one
            self._failures.append(f"a step of {len(plan.rows)} rows: {type(error).__name__}: {error}")


def _zeros(table: AdapterTable) -> Adapter:
    """An adapter of every linear, as large as there may be."""
    return Adapter(
        modules={
            name: LowRank(
                a=torch.zeros(table.max_rank, module.in_features),
                b=torch.zeros(module.out_features, table.max_rank),
                scaling=1.0,
            )
            for name, module in table.modules.items()
            if module.kind == "linear"
        }
    )


@contextmanager
def _listening(counter: _Counter) -> Iterator[None]:
    from triton import knobs

    before, knobs.compilation.listener = knobs.compilation.listener, counter
    try:
        yield
    finally:
        knobs.compilation.listener = before


@contextmanager
def _compiling(pool: ThreadPoolExecutor, failures: list[str]) -> Iterator[None]:
    """Launches hand their kernels to the pool; all of them are compiled when it ends."""
    from triton import AsyncCompileMode

    mode = AsyncCompileMode(pool, ignore_errors=True)
    with mode:
        yield
    for future in mode.raw_futures:
        if (error := future.exception()) is not None:
            failures.append(f"{type(error).__name__}: {error}")
