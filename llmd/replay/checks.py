"""Whether the recorded plans agree with themselves: a mistake of the scheduler shows here, without any device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_PROBLEMS = 100


class _Row:
    def __init__(self, num_computed: int | None, num_blocks: list[int]) -> None:
        self.num_computed = num_computed  # None: not known, it was there before the first step
        self.num_blocks = num_blocks


class PlanChecker:
    """Follows rows and block tables through the steps of a record."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        info = content["info"]
        self.problems: list[str] = []
        self._num_groups, self._block_size = info["num_kv_groups"], info["block_size"]
        self._max_model_len, self._num_blocks = info["max_model_len"], info["num_blocks"]
        self._rows = {row["row"]: _Row(None, [len(table) for table in row["tables"]]) for row in content["rows"]}
        self._tables = {row["row"]: [list(table) for table in row["tables"]] for row in content["rows"]}
        for step in content["steps"]:
            if len(self.problems) < _MAX_PROBLEMS:
                self._step(step)

    def _say(self, step: Mapping[str, Any], text: str) -> None:
        self.problems.append(f"step {step['step_id']}: {text}")

    def _step(self, step: Mapping[str, Any]) -> None:
        for row in step["released"]:
            self._rows.pop(row, None)
            self._tables.pop(row, None)
        for entry in step["admitted"]:
            if entry["row"] in self._rows:
                self._say(step, f"row {entry['row']} is given to {entry['request_id']} and was not free")
            self._rows[entry["row"]] = _Row(0, [])
            self._tables[entry["row"]] = [[] for _ in range(self._num_groups)]
        for update in step["block_updates"]:
            self._blocks(step, *update)
        admitted = {entry["row"] for entry in step["admitted"]}
        self._copies(step, step.get("block_copies", ()), admitted)
        for row, start, count in zip(step["rows"], step["starts"], step["counts"], strict=True):
            self._chunk(step, row, start, count, row in admitted)
        self._writes(step)

    def _blocks(self, step: Mapping[str, Any], row: int, group: int, first: int, block_ids: Sequence[int]) -> None:
        tables = self._tables.get(row)
        if tables is None or group >= len(tables):
            self._say(step, f"row {row} is given blocks and has no sequence")
            return
        if len(tables[group]) != first:
            self._say(step, f"row {row} has {len(tables[group])} blocks and is given more from {first} on")
        if block_ids and max(block_ids) >= self._num_blocks:
            self._say(step, f"row {row} is given block {max(block_ids)} of {self._num_blocks}")
        tables[group][first:] = block_ids

    def _chunk(self, step: Mapping[str, Any], row: int, start: int, count: int, is_new: bool) -> None:
        known = self._rows.get(row)
        if known is None:
            self._say(step, f"row {row} is computed and has no sequence")
            return
        if not is_new and known.num_computed is not None and start > known.num_computed:
            self._say(step, f"row {row} is computed from {start} on and only {known.num_computed} tokens were before")
        if start + count > self._max_model_len:
            self._say(step, f"row {row} is computed to {start + count}, past the context of {self._max_model_len}")
        for group, table in enumerate(self._tables[row]):
            if start + count > len(table) * self._block_size:
                self._say(step, f"row {row}, group {group}: {len(table)} blocks do not hold {start + count} tokens")
        known.num_computed = start + count

    def _copies(self, step: Mapping[str, Any], copies: Sequence[Sequence[int]], admitted: set[int]) -> None:
        """What somebody holds goes where only a new row looks, and nothing is read that a copy writes."""
        if not copies:
            return
        holders = Counter(block_id for tables in self._tables.values() for table in tables for block_id in table)
        new = {block_id for row in admitted for table in self._tables[row] for block_id in table}
        targets = Counter(target for _, target in copies)
        for source, target in copies:
            if not holders[source] or source in targets:
                self._say(step, f"block {source} is copied and {'is written by a copy' if holders[source] else 'free'}")
            if target not in new or holders[target] > 1 or targets[target] > 1:
                self._say(step, f"a copy goes into block {target}, which is not one new row's alone")

    def _writes(self, step: Mapping[str, Any]) -> None:
        """No two rows write into one block."""
        writers: Counter[int] = Counter()
        for row, start, count in zip(step["rows"], step["starts"], step["counts"], strict=True):
            for table in self._tables.get(row, ()):
                writers.update(table[start // self._block_size : -(-(start + count) // self._block_size)])
        for block_id, number in writers.items():
            if number > 1:
                self._say(step, f"{number} rows write into block {block_id}")


def check_plans(content: Mapping[str, Any]) -> list[str]:
    """Everything in the recorded plans that cannot be; empty: they agree."""
    return PlanChecker(content).problems
