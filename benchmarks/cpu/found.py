"""What is to be measured, and what was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .engine_list import LLMD, LLMD_FRESH, LLMD_HTTP
from .works import HTTP, LESS_IS_BETTER, START


class Key(NamedTuple):
    """What a figure is of."""

    model_format: str
    work: str
    engine: str


class Sample(NamedTuple):
    """A figure of one round."""

    round: int
    value: float
    foreign: float = 0.0  # share of the machine that others took meanwhile
    waited_s: float = 0.0  # for the machine to get quiet
    is_noisy: bool = False
    first: Sequence[int] = ()  # first token of each prompt, where the engine tells


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and within which bounds."""

    engines: Mapping[str, Sequence[str]]  # of each format
    works: Sequence[str]
    rounds: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)  # for every engine: threads, max_model_len …
    vocab_size: int = 1000
    timeout_s: float = 180.0
    budget_s: float = 720.0
    sit_out: float = 0.7  # a peer below this share of the best one's figure does not run that work again
    noisy_above: float = 0.05  # share of the machine that others may take while an engine runs
    is_strict: bool = False  # a machine that does not get quiet ends the run

    @property
    def served(self) -> list[str]:
        """The works that a started engine is given."""
        return [work for work in self.works if work != START]

    def has_part(self, key: Key) -> bool:
        """Whether the engine is ever given that work: HTTP is a matter between llmd and itself."""
        if key.work == HTTP:
            return key.engine in (LLMD, LLMD_HTTP) and LLMD_HTTP in self.engines[key.model_format]
        return key.engine != LLMD_HTTP and (key.work == START or key.engine != LLMD_FRESH)


@dataclass
class Found:
    """All that was measured."""

    samples: dict[Key, list[Sample]] = field(default_factory=dict)
    bandwidths: dict[tuple[str, int], float] = field(default_factory=dict)  # of each format and round, bytes/s
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each engine says of itself
    failures: dict[str, str] = field(default_factory=dict)  # of "engine format": why it is out
    notes: list[str] = field(default_factory=list)

    def add(self, key: Key, sample: Sample) -> None:
        """Keep a figure."""
        self.samples.setdefault(key, []).append(sample)

    def of(self, model_format: str, work: str) -> dict[str, list[Sample]]:
        """The samples of each engine."""
        return {key.engine: samples for key, samples in self.samples.items() if key[:2] == (model_format, work)}

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Each format and work that has figures, in the order of their first ones."""
        yield from dict.fromkeys(key[:2] for key in self.samples)


def better(work: str, left: float, right: float) -> float:
    """How many times better the left figure is than the right one."""
    return right / left if work in LESS_IS_BETTER else left / right
