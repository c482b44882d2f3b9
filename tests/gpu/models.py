"""Runners of tiny models on a device, with the installed plugins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from llmd.api.v1.testing.driver import StepDriver, installed_parts
from llmd.config import AdaptersConfig, CacheConfig, ModelConfig, SchedulerConfig
from llmd.model.runner import Runner


@contextmanager
def loaded(path, device, *, cache=None, scheduler=None, adapters=None, sampler="", **model: Any) -> Iterator[Runner]:
    """A loaded Runner whose memory is free again afterwards; `sampler` names the only one that it has."""
    given = {"dtype": "float32", "device": device.type, "enforce_eager": True, "prepacked_cache": False, **model}
    parts = installed_parts(adapters=AdaptersConfig(enable_lora=True, **adapters) if adapters else None)
    if sampler:
        parts = replace(parts, samplers={sampler: parts.samplers[sampler]})
    runner = Runner(
        ModelConfig(model=str(path), **given),
        CacheConfig(**{"block_size": 16, "kv_cache_bytes": 16 << 20, **(cache or {})}),
        SchedulerConfig(**{"max_num_seqs": 16, "max_num_batched_tokens": 512, **(scheduler or {})}),
        path,
        parts,
    )
    try:
        runner.info = runner.load(lambda progress: None)  # type: ignore[attr-defined]
        yield runner
    finally:
        runner.close()


def logits_of(runner: Runner, token_ids: list[int]) -> torch.Tensor:
    """[T, V] of a prompt that is computed in two chunks, so that the second reads the cache; on the host."""
    found: list[torch.Tensor] = []
    inner = runner.forward
    runner.forward = lambda batch: found.append(inner(batch)) or found[-1]  # type: ignore[assignment]
    driver = StepDriver(runner)
    sequence = driver.sequence(token_ids)
    half = len(token_ids) // 2
    for count in (half, len(token_ids) - half):
        driver.step([(sequence, count)])
    runner.forward = inner  # type: ignore[method-assign]
    driver.finish([sequence])
    with torch.inference_mode():
        return runner.logits(torch.cat(found)).float().cpu()


def generated(
    runner: Runner, prompts: list[list[int]], num_tokens: int, slots: Any = None, **params: Any
) -> list[list[int]]:
    """Prompts and what was drawn behind each: prompts in chunks, steps of changing rows."""
    driver = StepDriver(runner)
    sequences: list[SimpleNamespace] = [
        driver.sequence(prompt, seed=index, slot=slots[index] if slots else None, **params)
        for index, prompt in enumerate(prompts)
    ]
    driver.generate(sequences, num_tokens, chunks=(7, 30, 3), in_turns=True)
    return [sequence.tokens for sequence in sequences]
