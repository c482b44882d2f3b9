"""One continuation of a request: the only mutable object that walks the whole road, owned by the loop thread."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from llmd.engine.params import SamplingParams
from llmd.engine.request import Request
from llmd.engine.step import FinishReason

if TYPE_CHECKING:
    from llmd.engine.adapter_slots import AdapterEntry


class SequenceState(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    LOADING = "loading"  # waits for its adapter's files
    RUNNING = "running"
    PREEMPTED = "preempted"  # waits again, to be recomputed
    FINISHED = "finished"


class Sequence:
    """Tokens known, tokens computed, and where their KV lies.

    `num_tokens` counts the known tokens and those that steps in flight are about to sample; `num_computed_tokens` counts
    what finished or planned steps compute. Scheduling is to let the second catch up with the first.
    """

    __slots__ = (
        "adapter",
        "block_ids",
        "error",
        "finish_reason",
        "first_scheduled_s",
        "first_step",
        "index",
        "leader",
        "limit",
        "matcher",
        "max_computed",
        "min_length",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_scored_tokens",
        "num_stale",
        "num_steps",
        "num_tokens",
        "order",
        "prefix_hashes",
        "request",
        "row",
        "samples",
        "seed",
        "seq_id",
        "state",
        "stop_ids",
        "token_ids",
    )

    def __init__(self, request: Request, index: int, seq_id: int, seed: int, max_model_len: int) -> None:
        params = request.params
        self.request = request
        self.index = index
        self.seq_id = seq_id
        self.seed = seed
        self.token_ids = list(request.prompt.token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.samples = isinstance(params, SamplingParams)
        self.limit = self.num_prompt_tokens + 1  # num_tokens at which generation ends
        self.min_length = 0  # a stop token before this length does not end it
        self.stop_ids: frozenset[int] = frozenset()
        if isinstance(params, SamplingParams):
            self._set_limits(params, max_model_len)
        self.max_computed = self.limit - 1  # the last token is never an input
        self.order: tuple[int, int] = (0, seq_id)  # set by the scheduler: who goes first among running ones
        self.adapter: AdapterEntry | None = None  # set by the scheduler
        self.leader: Sequence | None = None  # the sibling that computes the common prompt first
        self.state = SequenceState.WAITING
        self.row: int | None = None
        self.num_tokens = self.num_prompt_tokens
        self.num_computed_tokens = 0
        self.num_in_flight = 0  # steps submitted and not committed
        self.block_ids: list[list[int]] = []  # one block table a KV group
        self.prefix_hashes: list[bytes] = []  # of its full blocks, as far as they were needed
        self.num_registered_blocks = 0
        self.num_cached_tokens = 0
        self.num_scored_tokens = 0  # prompt positions whose logits were asked for; a recomputation does not ask again
        self.matcher = request.grammar.matcher() if request.grammar is not None else None
        self.num_stale = 0  # samples in flight for positions whose tokens have been forced meanwhile: dropped
        self.num_preemptions = 0
        self.first_scheduled_s: float | None = None
        self.first_step = 0  # the step in which it was given its first row
        self.num_steps = 0  # from then to its end, its own or not; known when it has ended
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None

    def _set_limits(self, params: SamplingParams, max_model_len: int) -> None:
        room = max_model_len if params.max_tokens is None else self.num_prompt_tokens + params.max_tokens
        self.limit = min(room, max_model_len)
        self.min_length = self.num_prompt_tokens + params.min_tokens
        eos = () if params.ignore_eos else self.request.eos_token_ids
        if self.request.grammar is not None:
            eos = self.request.eos_token_ids  # a grammar that has ended allows nothing else
        self.stop_ids = frozenset(eos) | frozenset(params.stop_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it has ended; results of steps still in flight for it are dropped."""
        return self.state is SequenceState.FINISHED

    @property
    def is_admissible(self) -> bool:
        """Whether a row may be given: no old step in flight, and the common prompt computed by its leader."""
        if self.num_in_flight:
            return False
        leader = self.leader
        return leader is None or leader.is_finished or leader.num_output_tokens > 0

    @property
    def has_prompt_kv(self) -> bool:
        """Whether its blocks hold the whole prompt for certain: a token that followed it was committed, in its first row."""
        return self.row is not None and self.num_output_tokens > 0 and not self.num_preemptions

    def __repr__(self) -> str:
        progress = f"{self.num_computed_tokens}/{self.num_tokens}"
        return f"Sequence({self.request.request_id!r}, {self.index}, {self.state.value}, {progress})"
