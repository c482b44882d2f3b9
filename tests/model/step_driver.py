"""Drives a Runner with hand-made StepPlans, and makes tiny models to compare it with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.step import BlockUpdate, RowAdmit, StepPlan, StepResult
from llmd.model.loader import ModelParts
from llmd.model.runner import Runner

GREEDY = SamplingParams(temperature=0.0, max_tokens=1000)


def model_parts() -> ModelParts:
    """The built-in plugins that a model needs."""
    from llmd_plugins.architectures import llama, qwen2, qwen3
    from llmd_plugins.attention import cpu, reference
    from llmd_plugins.checkpoints import dummy, safetensors
    from llmd_plugins.quantization import int8
    from llmd_plugins.sampling import torch as torch_sampling

    architectures = [spec for plugin in (llama, qwen2, qwen3) for spec in plugin.llmd_register_architectures()]
    backends = [*cpu.llmd_register_attention_backends(), *reference.llmd_register_attention_backends()]
    formats = [*dummy.llmd_register_checkpoint_formats(), *safetensors.llmd_register_checkpoint_formats()]
    return ModelParts(
        architectures={name: spec for spec in architectures for name in spec.architectures},
        attention_backends={spec.name: spec for spec in backends},
        checkpoint_formats={spec.name: spec for spec in formats},
        quantizations={spec.name: spec for spec in int8.llmd_register_quantizations()},
        samplers={spec.name: spec for spec in torch_sampling.llmd_register_samplers()},
    )


def make_runner(
    path: Path, *, cache: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None, **model: Any
) -> Runner:
    """A loaded Runner on the CPU."""
    model = {"dtype": "float32", "device": "cpu", **model}
    runner = Runner(
        ModelConfig(model=str(path), **model),
        CacheConfig(**{"block_size": 4, "kv_cache_bytes": 8 << 20, **(cache or {})}),
        SchedulerConfig(**{"max_num_seqs": 16, "max_num_batched_tokens": 512, **(scheduler or {})}),
        path,
        model_parts(),
    )
    runner.info = runner.load(lambda progress: None)  # type: ignore[attr-defined]
    return runner


class StepDriver:
    """Plays the engine: gives rows and blocks (scattered at random), makes plans, keeps each sequence's tokens."""

    def __init__(self, runner: Runner, *, seed: int = 0) -> None:
        self.runner = runner
        self.block_size = runner.rows.block_size
        self._random = random.Random(seed)
        self._free_blocks = list(range(runner.kv.num_blocks))
        self._random.shuffle(self._free_blocks)
        self._free_rows = list(range(runner.rows.token_ids.shape[0]))
        self._random.shuffle(self._free_rows)
        self._released: list[int] = []
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

    def sequence(
        self, prompt: Sequence[int], params: SamplingParams | PoolingParams = GREEDY, seed: int = 0
    ) -> SimpleNamespace:
        """A sequence that waits for a row."""
        return SimpleNamespace(
            tokens=list(prompt), num_prompt=len(prompt), params=params, seed=seed, computed=0, row=None, blocks=[]
        )

    def release(self, sequence: SimpleNamespace) -> None:
        """Take back row and blocks; a sequence that is stepped again is recomputed, as after preemption."""
        self._released.append(sequence.row)
        self._free_rows.append(sequence.row)
        self._free_blocks += sequence.blocks
        self._random.shuffle(self._free_blocks)
        sequence.row, sequence.blocks, sequence.computed = None, [], 0

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
        return StepPlan(step_id=self._step_id, released=released, admitted=admitted, block_updates=updates, **columns)

    def _admit(self, sequence: SimpleNamespace) -> RowAdmit:
        return RowAdmit(
            row=sequence.row, seq_id=id(sequence), request_id="r", token_ids=tuple(sequence.tokens),
            num_prompt_tokens=sequence.num_prompt, params=sequence.params, seed=sequence.seed,
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

    def generate(self, sequences: Sequence[SimpleNamespace], num_tokens: int, *, chunks: Sequence[int] = (1 << 20,)) -> None:
        """Until each has so many output tokens; prompts are computed in chunks of the given sizes, in turn."""
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
            self.step(work)
