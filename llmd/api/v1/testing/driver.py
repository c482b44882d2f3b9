"""Plays the engine: hand-made StepPlans for a Runner that is loaded with the installed plugins and the one under test."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llmd.config import AdaptersConfig, CacheConfig, ModelConfig, PluginsConfig, SchedulerConfig
from llmd.daemon import model_parts
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.step import AdapterLoad, BlockUpdate, RowAdmit, StepPlan, StepResult
from llmd.model.parts import ModelParts
from llmd.model.runner import Runner
from llmd.plugin.catalog import build_catalog
from llmd.plugin.specs import ArchitectureSpec, QuantizationSpec, Spec

GREEDY = SamplingParams(temperature=0.0, max_tokens=1000)


def installed_parts(*specs: Spec, adapters: AdaptersConfig | None = None) -> ModelParts:
    """What the installed plugins offer the model layer, with `specs` in place of what has their names."""
    parts = model_parts(build_catalog(PluginsConfig()), adapters)
    for spec in specs:
        if isinstance(spec, ArchitectureSpec):
            mine = dict.fromkeys(spec.architectures, spec)
            parts = replace(parts, architectures={**parts.architectures, **mine})
        elif isinstance(spec, QuantizationSpec):
            parts = replace(parts, quantizations={**parts.quantizations, spec.name: spec})
        else:
            raise TypeError(f"a {type(spec).__name__} is given; allowed: ArchitectureSpec, QuantizationSpec")
    return parts


def make_runner(path: Path, *specs: Spec, **model: Any) -> Runner:
    """A Runner with the model in `path`, on a CPU in float32 unless `model` (keys of [[models]]) says otherwise.

    `specs` are taken beside the installed plugins'. Blocks hold 4 tokens. Raises ModelError for what cannot be loaded.
    """
    runner = Runner(
        ModelConfig(model=str(path), **{"dtype": "float32", "device": "cpu", **model}),
        CacheConfig(block_size=4, kv_cache_bytes=8 << 20),
        SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=512),
        path,
        installed_parts(*specs),
    )
    runner.info = runner.load(lambda progress: None)  # type: ignore[attr-defined]
    return runner


class StepDriver:
    """Plays the engine: gives rows and blocks (scattered at random), makes plans, keeps each sequence's tokens."""

    def __init__(self, runner: Runner, *, seed: int = 0) -> None:
        self.runner = runner
        self.block_size = runner.rows.block_size
        self._random = random.Random(seed)
        self._free_blocks = list(range(runner.num_blocks))
        self._random.shuffle(self._free_blocks)
        self._free_rows = list(range(runner.rows.max_num_rows))
        self._random.shuffle(self._free_rows)
        self._released: list[int] = []
        self._adapter_loads: list[AdapterLoad] = []
        self._step_id = 0
        self.logits: dict[int, list[torch.Tensor]] = {}
        self._watch_logits()

    def _watch_logits(self) -> None:
        """Keep the logits that the sampler sees, in the order of the batch."""
        sampler = self.runner._sampler
        inner = sampler.sample

        def sample(logits: torch.Tensor, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            for row, line in zip(rows.tolist(), logits.clone(), strict=True):
                self.logits.setdefault(row, []).append(line)
            return inner(logits, rows, *args, **kwargs)

        sampler.sample = sample  # type: ignore[method-assign]

    def load_adapter(self, path: Path, slot: int) -> None:
        """Read an adapter and have the next step put it into a slot."""
        self._step_id += 1
        self.runner.keep_adapter(self._step_id, self.runner.read_adapter(path))
        self._adapter_loads.append(AdapterLoad(slot, self._step_id))

    def sequence(
        self,
        prompt: Sequence[int],
        params: SamplingParams | PoolingParams = GREEDY,
        seed: int = 0,
        slot: int | None = None,
    ) -> SimpleNamespace:
        """A sequence that waits for a row; it uses the adapter in `slot`."""
        return SimpleNamespace(
            tokens=list(prompt), num_prompt=len(prompt), params=params, seed=seed, computed=0, row=None, blocks=[], slot=slot
        )

    def release(self, sequence: SimpleNamespace) -> None:
        """Take back row and blocks; a sequence that is stepped again is recomputed, as after preemption."""
        self._released.append(sequence.row)
        self._free_rows.append(sequence.row)
        self._free_blocks += sequence.blocks
        self._random.shuffle(self._free_blocks)
        sequence.row, sequence.blocks, sequence.computed = None, [], 0

    def finish(self, sequences: Sequence[SimpleNamespace]) -> None:
        """Let all of them go, in a step that computes nothing."""
        for sequence in sequences:
            self.release(sequence)
        self.step([])

    def plan(self, work: Sequence[tuple[SimpleNamespace, int]], *, num_logits: Sequence[int] | None = None) -> StepPlan:
        """A plan that computes so many tokens of each sequence; one that catches up samples."""
        admitted, updates = [], []
        columns: dict[str, list[Any]] = {"rows": [], "starts": [], "counts": [], "num_logits": [], "samples": []}
        for index, (sequence, count) in enumerate(work):
            if sequence.row is None:
                sequence.row = self._free_rows.pop()
                self.logits.pop(sequence.row, None)
                admitted.append(self._admit(sequence))
            if update := self._grow(sequence, sequence.computed + count):
                updates.append(update)
            catches_up = sequence.computed + count == len(sequence.tokens)
            samples = catches_up and isinstance(sequence.params, SamplingParams)
            columns["rows"].append(sequence.row)
            columns["starts"].append(sequence.computed)
            columns["counts"].append(count)
            columns["num_logits"].append(num_logits[index] if num_logits else int(samples))
            columns["samples"].append(samples)
            sequence.computed += count
        self._step_id += 1
        released, self._released = self._released, []
        loads, self._adapter_loads = self._adapter_loads, []
        return StepPlan(
            step_id=self._step_id, released=released, adapter_loads=loads, admitted=admitted, block_updates=updates,
            **columns,
        )  # fmt: skip

    def _admit(self, sequence: SimpleNamespace) -> RowAdmit:
        return RowAdmit(
            row=sequence.row, seq_id=id(sequence), request_id="r", token_ids=tuple(sequence.tokens),
            num_prompt_tokens=sequence.num_prompt, params=sequence.params, seed=sequence.seed, adapter_slot=sequence.slot,
        )  # fmt: skip

    def _grow(self, sequence: SimpleNamespace, num_tokens: int) -> BlockUpdate | None:
        lacking = -(-num_tokens // self.block_size) - len(sequence.blocks)
        if lacking <= 0:
            return None
        blocks = [self._free_blocks.pop() for _ in range(lacking)]
        update = BlockUpdate(sequence.row, 0, len(sequence.blocks), blocks)
        sequence.blocks += blocks
        return update

    def step(self, work: Sequence[tuple[SimpleNamespace, int]], **kwargs: Any) -> StepResult:
        """Run one step and append what was sampled."""
        plan = self.plan(work, **kwargs)
        result = self.runner.run(plan)
        tokens = iter(result.token_ids)
        for (sequence, _), samples in zip(work, plan.samples, strict=True):
            if samples:
                sequence.tokens.append(next(tokens))
        return result

    def generate(
        self,
        sequences: Sequence[SimpleNamespace],
        num_tokens: int,
        *,
        chunks: Sequence[int] = (1 << 20,),
        in_turns: bool = False,
    ) -> None:
        """Until each has so many output tokens; prompts are computed in chunks of the given sizes, in turn.

        `in_turns`: each step computes some of them only, in another order each time.
        """
        turn = 0
        while True:
            work = []
            for sequence in sequences:
                if len(sequence.tokens) - sequence.num_prompt < num_tokens:
                    lacking = len(sequence.tokens) - sequence.computed
                    work.append((sequence, min(lacking, chunks[turn % len(chunks)])))
                    turn += 1
            if not work:
                return
            self.step(self._random.sample(work, self._random.randint(1, len(work))) if in_turns else work)
