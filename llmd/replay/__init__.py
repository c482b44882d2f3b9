"""Running the steps of a flight record again, offline, on any model that is large enough."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmd.replay.checks import check_plans
from llmd.replay.plans import BadRecord, Needs, Planned, Plans, check_format, needs

if TYPE_CHECKING:
    from llmd.config import Config
    from llmd.engine.executor import Executor, ExecutorInfo
    from llmd.engine.step import StepResult

__all__ = ["BadRecord", "Divergence", "Replayed", "check_plans", "read_flight", "replay_flight"]

_MAX_BYTES = 1 << 30


class Divergence(NamedTuple):
    """Where a row first said something else than it did then."""

    step_id: int
    row: int
    recorded: int
    now: int


class Replayed(NamedTuple):
    """What a replay found."""

    num_steps: int  # recorded ones that ran
    num_tokens: int
    elapsed_s: float
    problems: list[str]  # in the plans themselves
    failures: list[str]  # steps that raised, or rows that failed in them
    compared: int  # tokens
    divergences: list[Divergence]

    @property
    def is_same(self) -> bool:
        """Whether the plans agree, every step ran, and all that could be compared was the same."""
        return not (self.problems or self.failures or self.divergences)


def read_flight(path: Path) -> dict[str, Any]:
    """A flight record's content. Raises BadRecord."""
    import orjson

    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadRecord(f"{path.name} is larger than any flight record ({_MAX_BYTES} bytes)")
        content = orjson.loads(path.read_bytes())
    except OSError as error:
        raise BadRecord(f"{path.name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadRecord(f"{path.name} is no JSON: {error}") from None
    check_format(content)
    return content


def replay_flight(content: Mapping[str, Any], options: Mapping[str, Any]) -> Replayed:
    """Run a record's steps on the model that `options` (those of `llmd serve`) describe; blocks.

    Raises BadRecord where the model's context, rows or KV pool are too small for the record.
    """
    from llmd.config_load import load_config
    from llmd.daemon import load_catalog, model_parts, resolve_model
    from llmd.flags import settings_of

    want = needs(content)
    sizes = {"block_size": want.block_size, "max_num_seqs": want.num_rows}
    config = load_config(settings=settings_of({**sizes, **options}))
    catalog = load_catalog(config)
    model = config.models[0]
    path = resolve_model(config, catalog, model)
    executor = catalog.executors[model.executor].build(
        model, path=path, cache=config.cache, scheduler=config.scheduler, parts=model_parts(catalog)
    )
    return asyncio.run(_replay(content, executor, want, config))


async def _replay(content: Mapping[str, Any], executor: Executor, want: Needs, config: Config) -> Replayed:
    info = await executor.start(lambda progress: None)
    try:
        _check_size(want, info)
        return await _Run(content, executor, info, config.models[0].model).run()
    finally:
        await executor.stop()


def _check_size(want: Needs, info: ExecutorInfo) -> None:
    if want.num_tokens > info.max_model_len:
        raise BadRecord(f"the record has a row of {want.num_tokens} tokens and the model's context is {info.max_model_len}")
    if info.kv_groups and want.num_blocks > info.num_blocks:
        raise BadRecord(f"the record uses {want.num_blocks} KV blocks and the pool has {info.num_blocks}")


class _Run:
    def __init__(self, content: Mapping[str, Any], executor: Executor, info: ExecutorInfo, model: str) -> None:
        self._content, self._executor, self._info = content, executor, info
        # another model says something else
        self._compares = content["with_tokens"] and content.get("model") == model
        self._failures: list[str] = []
        self._divergences: dict[int, Divergence] = {}  # by row, of the sequence it holds now
        self._past: list[Divergence] = []
        self._compared = self._num_steps = self._num_tokens = 0

    async def run(self) -> Replayed:
        """One step after the other, each with its answer."""
        began_s = time.perf_counter()
        for planned in Plans(self._content, self._info.vocab_size):
            await self._step(planned)
        return Replayed(
            self._num_steps, self._num_tokens, time.perf_counter() - began_s, check_plans(self._content), self._failures,
            self._compared, [*self._past, *self._divergences.values()],
        )  # fmt: skip

    async def _step(self, planned: Planned) -> None:
        plan, record = planned
        try:
            result = await self._executor.submit(plan)
        except Exception as error:  # noqa: BLE001 - whatever a step raises is what the replay is for
            name = "before the first step" if record is None else f"step {plan.step_id}"
            self._failures.append(f"{name}: {type(error).__name__}: {error}")
            return
        if record is None:
            return
        self._num_steps += 1
        self._num_tokens += plan.num_tokens
        self._failures += [f"step {plan.step_id}, row {row}: {text}" for row, text in result.errors.items()]
        self._compare(record, result)

    def _compare(self, record: Mapping[str, Any], result: StepResult) -> None:
        if not self._compares or record.get("token_ids") is None:
            return
        for entry in record["admitted"]:
            if (found := self._divergences.pop(entry["row"], None)) is not None:
                self._past.append(found)
        masked = {record["rows"][index] for index in record["masked"]}
        sampling = [row for row, samples in zip(record["rows"], record["samples"], strict=True) if samples]
        for row, then, now in zip(sampling, record["token_ids"], result.token_ids, strict=False):
            if row in masked or row in self._divergences:
                continue  # its grammar is not here; it reads its own tokens now
            self._compared += 1
            if then != now:
                self._divergences[row] = Divergence(record["step_id"], row, then, now)
