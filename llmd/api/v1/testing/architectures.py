"""Architectures: logits against a reference, and the same whatever the schedule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmd.api.v1 import ArchitectureSpec, ModelError, QuantizationSpec
from llmd.api.v1.testing.compare import require, require_close
from llmd.api.v1.testing.driver import StepDriver, make_runner
from llmd.model.runner import Runner

_LENGTHS = (1, 7, 19)
_NUM_NEW = 5


class NoLogits(ModelError):
    """The model pools: there is nothing to compare."""


class Schedule(NamedTuple):
    """A way to compute the same sequences."""

    name: str
    chunks: tuple[int, ...]  # sizes of the pieces of prompts, in turn
    is_together: bool
    num_before: int = 0  # new tokens after which all are preempted, and computed again in other rows
    in_turns: bool = False  # each step computes some of them, in any order


_SCHEDULES = (
    Schedule("whole prompts, each alone", (1 << 20,), False),
    Schedule("whole prompts, in one batch", (1 << 20,), True),
    Schedule("prompts in chunks, in one batch", (3, 5, 1), True),
    Schedule("preempted and computed again", (7, 2), True, num_before=2),
    Schedule("in turns", (4, 1, 2), True, in_turns=True),
)


def check_architecture(
    path: Path,
    *specs: ArchitectureSpec | QuantizationSpec,
    reference: Callable[[Sequence[int]], Tensor] | None = None,
    tolerance: float = 1e-3,
    batch_invariant: bool = False,
    **model: Any,
) -> None:
    """The decoder in `path` gives the logits of `reference`, whatever else is computed in the same steps.

    Alone and in a batch, in turns with others, with its prompts in chunks, and again after a preemption. Where its layers
    keep states, rows hold NaN before they are given to a sequence: whoever reads what was left there is found.

    `reference(token_ids)` → [T, V] float32, the logits at each position of one sequence computed whole; without it only
    the schedules are compared with each other. `specs` are those that are not installed; `model` keys of [[models]]
    (load_format="dummy" needs no weights). Relative errors of each sequence up to `tolerance`; with `batch_invariant`
    the schedules must agree bit for bit. Raises ModelError for a model that cannot be loaded or gives no logits.
    """
    runner = make_runner(path, *specs, **model)
    if not runner.info.can_generate:  # type: ignore[attr-defined]
        raise NoLogits(f"{specs[0].name if specs else path.name} gives no logits: it pools, and has a reference of its own")
    first = _run(runner, _SCHEDULES[0])
    for tokens, logits in first if reference is not None else ():
        assert reference is not None
        expected = reference(tokens)[len(tokens) - len(logits) - 1 : -1]
        require_close(f"{len(tokens)} tokens, against the reference", logits, expected.float(), tolerance)
    for schedule in _SCHEDULES[1:]:
        for (tokens, logits), (other_tokens, other) in zip(first, _run(runner, schedule), strict=True):
            what = f"{len(tokens)} tokens, {schedule.name}"
            require(len(other_tokens) == len(tokens), f"{what}: {len(other_tokens)} tokens came")
            same = _num_same(tokens, other_tokens) - (len(tokens) - len(logits))  # behind a near tie they go apart
            require(same > 0, f"{what}: the first token differs")
            require_close(what, other[:same], logits[:same], 0.0 if batch_invariant else tolerance)


def _num_same(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True)))


def _run(runner: Runner, schedule: Schedule) -> list[tuple[list[int], Tensor]]:
    """For each sequence all its tokens and the logits that its new ones were drawn from."""
    generator = torch.Generator().manual_seed(1)
    size = runner.info.vocab_size  # type: ignore[attr-defined]
    driver = StepDriver(runner)
    for state in runner.states.tensors:
        state.fill_(float("nan") if state.is_floating_point() else 1)
    sequences = [driver.sequence(torch.randint(0, size, (n,), generator=generator).tolist()) for n in _LENGTHS]
    found = []
    for group in [sequences] if schedule.is_together else [[sequence] for sequence in sequences]:
        driver.generate(group, schedule.num_before, chunks=schedule.chunks)
        before = [_take_back(driver, sequence) if schedule.num_before else [] for sequence in group]
        driver.generate(group, _NUM_NEW, chunks=schedule.chunks, in_turns=schedule.in_turns)
        for sequence, logits in zip(group, before, strict=True):
            found.append((sequence.tokens, torch.stack(logits + driver.logits[sequence.row])))
    driver.finish(sequences)
    return found


def _take_back(driver: StepDriver, sequence: Any) -> list[Tensor]:
    """Preempt it; the logits that it had until then."""
    logits = driver.logits[sequence.row]
    driver.release(sequence)
    return logits
