"""Drives a Runner as the engine does: plans go in while the step before is still on the device."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.setting import Setting, wait
from benchmarks.gpu.shapes import write_model
from llmd.api.v1.testing.driver import installed_parts
from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.params import SamplingParams
from llmd.engine.step import BlockUpdate, RowAdmit, StepPlan
from llmd.model.runner import Runner

_BLOCK_SIZE = 16
_STEP_TOKENS = 8192


class Timing(NamedTuple):
    """Of one step, in the mean."""

    ms: float
    launch_ms: float  # of the CPU, to plan and launch it


class Model:
    """A model with random weights, and its steps."""

    def __init__(self, setting: Setting, max_rows: int, context: int, *, enforce_eager: bool = False) -> None:
        self.config = write_model(setting.folder / "model", setting.model, is_tiny=setting.is_tiny)
        self.max_len = min(_STEP_TOKENS, self.config["max_position_embeddings"]) if not setting.is_tiny else 256
        head_dim = self.config["hidden_size"] // self.config["num_attention_heads"]
        self.kv_token_bytes = 4 * self.config["num_hidden_layers"] * self.config["num_key_value_heads"] * head_dim
        self._held = -(-context // _BLOCK_SIZE)
        num_blocks = max(max_rows * self._held, -(-self.max_len // _BLOCK_SIZE)) + 2  # graphs' spare line wants one
        path = setting.folder / "model"
        self.runner = Runner(
            ModelConfig(
                model=str(path),
                dtype="bfloat16",
                device=setting.device.type,
                load_format="dummy",
                max_model_len=self.max_len,
                enforce_eager=enforce_eager,
            ),
            CacheConfig(block_size=_BLOCK_SIZE, kv_cache_bytes=num_blocks * _BLOCK_SIZE * self.kv_token_bytes),
            SchedulerConfig(max_num_seqs=max_rows, max_num_batched_tokens=self.max_len),
            path,
            installed_parts(),
        )
        start = time.perf_counter()
        self.info = self.runner.load(lambda progress: None)
        self.load_s = time.perf_counter() - start
        for layer in self.runner.kv.layers:  # random: zeros draw less power and run faster
            if isinstance(layer, torch.Tensor):
                layer.normal_()
        self._device, self._step = setting.device, 0

    def close(self) -> None:
        """Free the device."""
        self.runner.close()

    def admit(self, num_rows: int, num_tokens: int, params: SamplingParams) -> None:
        """Rows from 0 on, each with so many tokens of its own and all the blocks that it may want."""
        chance = random.Random(0)
        held = self._held if num_rows > 1 else -(-self.max_len // _BLOCK_SIZE)
        rows = [
            RowAdmit(
                row=row, seq_id=row, request_id="", num_prompt_tokens=num_tokens, params=params, seed=row,
                token_ids=tuple(chance.choices(range(self.config["vocab_size"]), k=num_tokens)),
            )
            for row in range(num_rows)
        ]  # fmt: skip
        blocks = [BlockUpdate(row, 0, 0, range(row * held, (row + 1) * held)) for row in range(num_rows)]
        self.runner.run(StepPlan(step_id=self._next(), admitted=rows, block_updates=blocks))

    def plan(self, num_rows: int, start: int, count: int = 1, first: int = 0) -> StepPlan:
        """A step of rows that all stand at the same place, and sample."""
        ones = [1] * num_rows
        return StepPlan(
            step_id=self._next(), rows=list(range(first, first + num_rows)), starts=[start] * num_rows,
            counts=[count] * num_rows, num_logits=ones, samples=[True] * num_rows,
        )  # fmt: skip

    def decode(self, num_rows: int, context: int, num_steps: int, params: SamplingParams, num_warm: int = 4) -> Timing:
        """Steps of one token a row, two of them in flight."""
        self.admit(num_rows, context, params)
        plans = [self.plan(num_rows, context - 1 + step) for step in range(num_warm + num_steps)]
        self.run(plans[:num_warm])
        timing = self.run(plans[num_warm:])
        self.release(num_rows)
        return timing

    def tokens(
        self, num_rows: int, context: int, num_steps: int, params: SamplingParams, around: Callable[[], Any] | None = None
    ) -> list[list[int]]:
        """What rows draw behind prompts of their own, step by step. `around` makes a context for the decode steps."""
        self.admit(num_rows, context, params)
        for row in range(num_rows):
            self.runner.run(self.plan(1, 0, context, row))
        drawn: list[list[int]] = []
        plans = [self.plan(num_rows, context + step) for step in range(num_steps)]
        if around is None:
            self.run(plans, drawn)
        else:
            with around():
                self.run(plans, drawn, is_timed=False)
        self.release(num_rows)
        return drawn

    def prefill(self, num_tokens: int, repeats: int) -> Timing:
        """Whole prompts, one after another; the first, which compiles, does not count."""
        self.admit(1, num_tokens, SamplingParams(temperature=0.0, max_tokens=2))
        self.run([self.plan(1, 0, num_tokens)])
        timing = self.run([self.plan(1, 0, num_tokens) for _ in range(repeats)])
        self.release(1)
        return timing

    def run(self, plans: Sequence[StepPlan], drawn: list[list[int]] | None = None, *, is_timed: bool = True) -> Timing:
        """The mean of these steps; their tokens go into `drawn`."""
        if is_timed:
            wait(self._device)
        start, launching = time.perf_counter(), 0.0
        results, pending = [], None
        for plan in plans:
            cpu = time.thread_time()
            launched = self.runner.launch(plan)
            launching += time.thread_time() - cpu
            if pending is not None:
                results.append(pending.result())
            pending = launched
        if pending is not None:
            results.append(pending.result())
        if drawn is not None:
            drawn += [list(result.token_ids) for result in results]
        return Timing(1e3 * (time.perf_counter() - start) / len(plans), 1e3 * launching / len(plans))

    def release(self, num_rows: int) -> None:
        """The rows are free again."""
        self.runner.run(StepPlan(step_id=self._next(), released=list(range(num_rows))))

    def _next(self) -> int:
        self._step += 1
        return self._step
