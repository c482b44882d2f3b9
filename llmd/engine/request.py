"""What a client asked: immutable, validated, in token ids."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmd.engine.params import PoolingParams, SamplingParams

if TYPE_CHECKING:  # it imports numpy, which `llmd --help` can do without
    from llmd.engine.grammar import CompiledGrammar


WARM_UP = "warm-up-"  # how the daemon's own requests are named: nobody is suspected for them


@dataclass(frozen=True, slots=True)
class Span:
    """A range of prompt positions that stands for something else (an image, audio): its hash enters the block hash."""

    start: int
    length: int
    content_hash: bytes
    handle: str  # names the processed tensor on the executor's side


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids and what they stand for."""

    token_ids: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    token_types: tuple[int, ...] = ()  # each token's segment, where an encoder reads a pair of texts; none: all 0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as the engine sees it. `n` of its params asks for so many Sequences over one prompt."""

    request_id: str
    prompt: Prompt
    params: SamplingParams | PoolingParams
    eos_token_ids: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # params.bad_words in token ids, by the text layer
    grammar: CompiledGrammar | None = None  # what the output must follow
    adapter: str | None = None
    namespace: bytes = b""  # separates prefix caches: adapter, cache salt, API key
    key: str = ""  # who asks; fairness and usage are counted by it
    priority: int = 0  # lower goes first
    arrival_s: float = field(default_factory=time.monotonic)
    deadline_s: float | None = None  # on the monotonic clock; past it the request ends with `timeout`

    @property
    def num_sequences(self) -> int:
        """How many continuations are wanted."""
        return self.params.n if isinstance(self.params, SamplingParams) else 1
