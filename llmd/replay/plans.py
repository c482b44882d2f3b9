"""From a flight record back to step plans: blocks renumbered, tokens as recorded or made up, cached KV computed again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from llmd.engine.flight import FORMAT
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.step import BlockCopy, BlockUpdate, RowAdmit, StepPlan, TokenUpdate
from llmd.errors import LlmdError

# not those that name tokens or texts: the vocabulary may be another one
_SAMPLING = frozenset(field.name for field in fields(SamplingParams)) - {
    "structured_outputs", "logit_bias", "stop", "bad_words", "stop_token_ids", "allowed_token_ids",
}  # fmt: skip
_FILL_TOKENS = 512  # of a row at once, to compute again what was computed before the first recorded step
_STRIDE = 7919
_FILL_STEP = -1  # their step id


class BadRecord(LlmdError):
    """A file that is no flight record, or one of another version."""


class Planned(NamedTuple):
    """One plan to run and, where it is a recorded one, its record."""

    plan: StepPlan
    record: Mapping[str, Any] | None


class Needs(NamedTuple):
    """What a device must hold to run a record."""

    num_blocks: int
    block_size: int
    num_rows: int
    num_tokens: int  # of the longest row


def check_format(content: Any) -> None:
    """Raise BadRecord for what cannot be replayed."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise BadRecord(f"this is no flight record of this version: its format must be {FORMAT!r}, got {found!r}")
    missing = [name for name in ("info", "rows", "steps", "with_tokens") if name not in content]
    if missing:
        raise BadRecord(f"the flight record lacks {', '.join(missing)}")


class Plans:
    """The plans of one record, for a vocabulary of `vocab_size` tokens."""

    def __init__(self, content: Mapping[str, Any], vocab_size: int) -> None:
        self._content, self._vocab_size = content, vocab_size
        self._blocks: dict[int, int] = {}
        self._held: set[int] = set()  # rows that have a sequence here
        self._is_paged = content["info"]["num_kv_groups"] > 0

    def __iter__(self) -> Iterator[Planned]:
        steps = self._content["steps"]
        yield from self._rows_before(steps)
        for step in steps:
            yield from self._step(step)

    # --- what came before

    def _rows_before(self, steps: Sequence[Mapping[str, Any]]) -> Iterator[Planned]:
        first = _first_chunks(steps)
        for row in self._content["rows"]:
            if not self._is_paged or row["row"] not in first:
                continue
            start, count = first[row["row"]]
            tables = [self._renumbered(block_ids) for block_ids in row["tables"]]
            updates = [BlockUpdate(row["row"], group, 0, block_ids) for group, block_ids in enumerate(tables)]
            length = max(start + count, row["num_tokens"])
            yield from self._fill(self._admit(row, length), updates, start)

    def _fill(self, admit: RowAdmit, updates: Sequence[BlockUpdate], end: int) -> Iterator[Planned]:
        """Give a row its sequence and compute its first `end` tokens."""
        for start in range(0, max(end, 1), _FILL_TOKENS):
            count = min(_FILL_TOKENS, end - start)
            rows = [admit.row] if count else []
            plan = StepPlan(
                step_id=_FILL_STEP, admitted=[admit] if not start else (),
                block_updates=updates if not start else (), rows=rows, starts=[start][: len(rows)],
                counts=[count][: len(rows)], num_logits=[0][: len(rows)], samples=[False][: len(rows)],
            )  # fmt: skip
            yield Planned(plan, None)

    # --- what was recorded

    def _step(self, step: Mapping[str, Any]) -> Iterator[Planned]:
        starts = dict(zip(step["rows"], step["starts"], strict=True))
        updates = [
            BlockUpdate(row, group, first, self._renumbered(block_ids))
            for row, group, first, block_ids in step["block_updates"]
        ]
        cached = {entry["row"] for entry in step["admitted"] if self._is_paged and starts.get(entry["row"], 0) > 0}
        released = [row for row in step["released"] if row in self._held]
        self._held.difference_update(released)
        if cached:  # their rows may have been released in this very step
            yield Planned(StepPlan(step_id=_FILL_STEP, released=released), None)
            released = []
        for entry in step["admitted"]:
            if entry["row"] in cached:
                own = [update for update in updates if update.row == entry["row"]]
                yield from self._fill(self._admit(entry, entry["num_tokens"]), own, starts[entry["row"]])
        plan = StepPlan(
            step_id=step["step_id"],
            released=released,
            admitted=[self._admit(entry, entry["num_tokens"]) for entry in step["admitted"] if entry["row"] not in cached],
            block_updates=[update for update in updates if update.row not in cached],
            block_copies=self._copies(step.get("block_copies", ())),
            token_updates=[self._token_update(*update) for update in step["token_updates"]],
            rows=step["rows"],
            starts=step["starts"],
            counts=step["counts"],
            num_logits=step["num_logits"],
            samples=step["samples"],
        )
        yield Planned(plan, step)

    def _admit(self, entry: Mapping[str, Any], length: int) -> RowAdmit:
        self._held.add(entry["row"])
        known = [token_id % self._vocab_size for token_id in entry.get("token_ids") or ()][:length]
        # made up from the position alone: sequences that share blocks then agree on what lies in them
        token_ids = known + [(1 + _STRIDE * position) % self._vocab_size for position in range(len(known), length)]
        return RowAdmit(
            row=entry["row"], seq_id=entry["seq_id"], request_id=entry["request_id"], token_ids=token_ids,
            num_prompt_tokens=entry["num_prompt_tokens"], params=self._params(entry["params"]), seed=entry["seed"],
        )  # fmt: skip

    def _copies(self, copies: Sequence[Sequence[int]]) -> list[BlockCopy]:
        """Those whose source is here: a row that no recorded step computes was given no blocks, and what the target is to
        hold was computed for it like everything before a row's first token."""
        known = self._blocks
        return [BlockCopy(known[source], known[target]) for source, target in copies if source in known]

    def _params(self, given: Mapping[str, Any]) -> SamplingParams | PoolingParams:
        if "pooling" in given:
            return PoolingParams(pooling=given["pooling"])
        values: dict[str, Any] = {name: value for name, value in given.items() if name in _SAMPLING}
        return SamplingParams(**values)

    def _token_update(self, row: int, first: int, token_ids: Sequence[int] | int) -> TokenUpdate:
        known = range(token_ids) if isinstance(token_ids, int) else token_ids
        return TokenUpdate(row, first, tuple(token_id % self._vocab_size for token_id in known))

    def _renumbered(self, block_ids: Sequence[int]) -> list[int]:
        """The pool of this machine may be smaller: what counts is which blocks are the same."""
        return [self._blocks.setdefault(block_id, len(self._blocks)) for block_id in block_ids]


def _first_chunks(steps: Sequence[Mapping[str, Any]]) -> dict[int, tuple[int, int]]:
    """Row → start and count of its first chunk, of rows that were there before the first step."""
    first: dict[int, tuple[int, int]] = {}
    gone: set[int] = set()
    for step in steps:
        gone.update(step["released"], (entry["row"] for entry in step["admitted"]))
        for row, start, count in zip(step["rows"], step["starts"], step["counts"], strict=True):
            if row not in gone:
                first.setdefault(row, (start, count))
    return first


def needs(content: Mapping[str, Any]) -> Needs:
    """What it takes to run a record."""
    steps, rows = content["steps"], content["rows"]
    blocks = {block_id for row in rows for table in row["tables"] for block_id in table}
    blocks.update(block_id for step in steps for *_, block_ids in step["block_updates"] for block_id in block_ids)
    ends = [start + count for step in steps for start, count in zip(step["starts"], step["counts"], strict=True)]
    lengths = [entry["num_tokens"] for step in steps for entry in step["admitted"]] + [row["num_tokens"] for row in rows]
    used = [row for step in steps for row in step["rows"]] + [row["row"] for row in rows]
    return Needs(len(blocks), content["info"]["block_size"], max(used, default=0) + 1, max([1, *ends, *lengths]) + 1)
