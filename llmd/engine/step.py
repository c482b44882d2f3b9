"""What goes over to the executor thread and what comes back: StepPlan and StepResult, frozen plain data.

Columns, not objects: a plan holds parallel lists over its scheduled rows, so that 256 decoding rows cost a few
microseconds to build, to turn into device arrays and to send to another process or node.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.request import Span

# why a row failed alone, where its numbers did; counted by the engine
NONFINITE_LOGITS = "the model's logits are not finite"
NONFINITE_STATES = "the model's hidden states are not finite"
NONFINITE = frozenset((NONFINITE_LOGITS, NONFINITE_STATES))


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # EOS, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context's end
    ABORT = "abort"  # the client left or asked
    TIMEOUT = "timeout"  # its deadline passed
    ERROR = "error"  # its own step failed
    REFUSED = "refused"  # it cannot be served as it asks: its adapter cannot be loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAdmit:
    """A sequence enters (or, after preemption, re-enters) a row of the executor's arrays: all that is known of it."""

    row: int
    seq_id: int
    request_id: str
    token_ids: Seq[int]  # prompt and the output tokens known so far
    num_prompt_tokens: int
    params: SamplingParams | PoolingParams
    seed: int  # always set; with the token's position it determines every draw, whatever else is in the batch
    eos_token_ids: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    adapter: str | None = None
    adapter_slot: int | None = None  # where the adapter lies on the device; set wherever `adapter` is
    spans: tuple[Span, ...] = ()
    token_types: Seq[int] = ()  # the prompt's, as Prompt has them


class BlockUpdate(NamedTuple):
    """`block_ids` follow from `first_index` on in the block table of `row` in KV group `group`."""

    row: int
    group: int
    first_index: int
    block_ids: Seq[int]


class BlockCopy(NamedTuple):
    """Block `target` becomes what block `source` is before the step computes anything: all layers, all tokens.

    Of a plan's copies no two have one target, and no target is a source: they may be done in any order.
    """

    source: int
    target: int


class TokenUpdate(NamedTuple):
    """Tokens of `row` from `first_position` on that are known without having been sampled (a grammar forces them)."""

    row: int
    first_position: int
    token_ids: Seq[int]


class AdapterLoad(NamedTuple):
    """The adapter that the executor has loaded under `adapter_id` goes into a slot, in place of what was there."""

    slot: int
    adapter_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: rows are released, adapters put into slots, rows admitted, given blocks and tokens, blocks copied, then rows
    computed, in this order.

    A scheduled row computes `counts[i]` tokens of row `rows[i]` at positions from `starts[i]` on. The token at a position
    that no one has told yet is the one the executor itself sampled last for that row. `num_logits[i]` of the last
    computed positions want logits (0: a chunk in the middle of a prompt); where `samples[i]`, the last one samples.
    """

    step_id: int
    released: Seq[int] = ()
    adapter_loads: Seq[AdapterLoad] = ()
    admitted: Seq[RowAdmit] = ()
    block_updates: Seq[BlockUpdate] = ()
    block_copies: Seq[BlockCopy] = ()
    token_updates: Seq[TokenUpdate] = ()
    rows: Seq[int] = ()
    starts: Seq[int] = ()
    counts: Seq[int] = ()
    num_logits: Seq[int] = ()
    samples: Seq[bool] = ()
    masked: Seq[int] = ()  # indices into `rows`: those whose sample a grammar constrains, in the order of the masks

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return sum(self.counts)


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: the token that stands there, its rank (1 = likeliest), and the top ones."""

    token_id: int
    logprob: float
    rank: int
    top_ids: Seq[int]
    top_logprobs: Seq[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step gave. `token_ids` runs over the plan's rows that sample, in their order, one token each.

    The maps are keyed by row and hold only rows that asked.
    """

    step_id: int
    token_ids: Seq[int] = ()
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    # one entry for each of the chunk's positions that wanted logits and is followed by a prompt token: that token's
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    pooled: dict[int, Any] = field(default_factory=dict)  # float32 numpy vectors, at a prompt's last chunk
    errors: dict[int, str] = field(default_factory=dict)  # rows that failed alone (NaN logits, say)
    forward_s: float = 0.0


class SequenceDelta(NamedTuple):
    """News of one sequence after a step, engine → text. The last one of a sequence carries its finish_reason."""

    request_id: str
    index: int  # type: ignore[assignment]  # which of the request's n sequences; hides tuple.index
    token_ids: Seq[int] = ()
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    pooled: Any = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop_token_ids entry that ended it (not EOS)
    error: str | None = None
    num_cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    queue_s: float | None = None  # from arrival to the first step it was part of; with the first delta
