"""Works on batches, one after the other, while the server has nothing else waiting; goes on after a restart."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from llmd.api.v1 import LocalClient, RequestRefused
from llmd_plugins.batches.lines import ENDPOINTS, Line, LineError, parse_line, read_lines, result_line
from llmd_plugins.batches.state import FINAL, Record, State, new_id, state_of

if TYPE_CHECKING:
    from llmd.api.v1 import ModelService, ServerContext

logger = logging.getLogger("llmd.batches")

_MAX_TOLD_ERRORS = 100
_PAUSE_S = 0.05  # between two looks whether there is room
_RETRY_S = 0.5
_TRY_AGAIN = (429, 503)  # busy, loading, shutting down: no answer to a batch


@asynccontextmanager
async def run_batches(context: ServerContext) -> AsyncIterator[None]:
    """Entered when the server starts; left, it stops where it is, and the next start goes on from there."""
    async with LocalClient(context, ENDPOINTS) as client:
        runner = context.shared["batches.runner"] = Runner(context, client)
        task = asyncio.get_running_loop().create_task(runner.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            state_of(context).close()


class Runner:
    """Loop thread only, but for what it reads from disk."""

    def __init__(self, context: ServerContext, client: LocalClient) -> None:
        self._context, self._client = context, client
        self._state: State = state_of(context)
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._current: tuple[str, asyncio.Task[None]] | None = None

    def add(self, batch_id: str) -> None:
        """Queue a batch."""
        self._queue.put_nowait(batch_id)

    def cancel(self, batch_id: str) -> None:
        """End a batch that is marked as cancelling."""
        if self._current is not None and self._current[0] == batch_id:
            self._current[1].cancel()
        else:
            self._finish(self._state.records["batches"][batch_id])

    async def run(self) -> None:
        """Take up what was left, then whatever comes."""
        if self._state.exists():
            try:
                self._state.open()
            except RequestRefused:
                return  # logged; the routes say it to who asks
            for left in self._state.records["batches"].values():
                if left["status"] not in FINAL:
                    self.add(left["id"])
        while True:
            batch_id = await self._queue.get()
            batch = self._state.records["batches"].get(batch_id)
            if batch is not None and batch["status"] not in FINAL:
                await self._one(batch)

    async def _one(self, batch: Record) -> None:
        task = asyncio.get_running_loop().create_task(self._work(batch))
        self._current = (batch["id"], task)
        try:
            await asyncio.wait([task])
        finally:
            self._current = None
            if not task.done():  # the server stops: the batch stays as it is
                task.cancel()
                await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("batch %s failed", batch["id"], exc_info=error)
            self._fail(batch, [{"code": "internal_error", "message": "the batch could not be worked on"}])
        elif batch["status"] not in FINAL:
            self._finish(batch)

    # --- one batch

    async def _work(self, batch: Record) -> None:
        if batch["status"] not in ("validating", "in_progress"):
            return
        offsets, problems = await asyncio.to_thread(self._validate, batch)
        if problems:
            self._fail(batch, problems)
            return
        done = await asyncio.to_thread(self._read_journals, batch)
        if batch["status"] == "validating":
            batch.update(status="in_progress", in_progress_at=int(time.time()))
        batch["request_counts"]["total"] = len(offsets)
        self._state.save("batches", batch)
        with (
            self._state.data(batch["input_file_id"]).open("rb") as file,
            self._state.journal(batch["id"], "output").open("ab", 0) as output,
            self._state.journal(batch["id"], "errors").open("ab", 0) as errors,
        ):
            todo = self._todo(batch, file, offsets, done)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._state.settings.max_concurrent, len(offsets))):
                    group.create_task(self._worker(batch, todo, output, errors))

    def _todo(self, batch: Record, file: BinaryIO, offsets: list[int], done: set[str]) -> Iterator[Line]:
        for offset in offsets:
            if time.time() > batch["expires_at"]:
                return
            file.seek(offset)
            line = parse_line(file.readline())
            if line.custom_id not in done:
                yield line

    async def _worker(self, batch: Record, todo: Iterator[Line], output: Any, errors: Any) -> None:
        for line in todo:
            status, request_id, body = await self._ask(batch, line)
            succeeded = status < 400
            (output if succeeded else errors).write(result_line(line.custom_id, request_id, status, body))
            batch["request_counts"]["completed" if succeeded else "failed"] += 1

    async def _ask(self, batch: Record, line: Line) -> tuple[int, str, bytes]:
        data = orjson.dumps({"priority": self._state.settings.priority, **line.body})
        request_id = f"{batch['id']}-{os.urandom(6).hex()}"
        while True:
            await self._room()
            answer = await self._client.call("POST", line.url, data, key=batch["key"], headers={"X-Request-Id": request_id})
            if answer.status not in _TRY_AGAIN:
                return answer.status, request_id, answer.body
            await asyncio.sleep(_RETRY_S)

    async def _room(self) -> None:
        """Wait while others wait, whatever the scheduling policy."""
        context = self._context
        while context.state != "ready" or any(_is_busy(model) for model in context.models()):
            await asyncio.sleep(_PAUSE_S)

    # --- files; these two run in a thread

    def _validate(self, batch: Record) -> tuple[list[int], list[dict[str, Any]]]:
        """Where the requests begin, or what is wrong with the file."""
        offsets: list[int] = []
        problems: list[dict[str, Any]] = []
        seen: set[str] = set()
        limit = self._state.settings.max_requests
        with self._state.data(batch["input_file_id"]).open("rb") as file:
            for number, (offset, data) in enumerate(read_lines(file), 1):
                try:
                    self._check(parse_line(data), batch, seen)
                except LineError as error:
                    problems.append({"code": error.code, "message": error.message, "param": error.param, "line": number})
                offsets.append(offset)
                if len(problems) >= _MAX_TOLD_ERRORS:
                    break
                if len(offsets) > limit:
                    problems.append({"code": "too_many_tasks", "message": f"a batch has at most {limit} requests"})
                    break
        if not offsets:
            problems.append({"code": "empty_file", "message": "the input file has no request"})
        return offsets, problems

    def _check(self, line: Line, batch: Record, seen: set[str]) -> None:
        if line.url != batch["endpoint"]:
            raise LineError("mismatched_url", f"url must be the batch's endpoint, {batch['endpoint']}", "url")
        if line.custom_id in seen:
            raise LineError("duplicate_custom_id", "custom_id must be unique in the file", "custom_id")
        seen.add(line.custom_id)

    def _read_journals(self, batch: Record) -> set[str]:
        """The requests that are answered already; a line that a crash cut off is dropped."""
        done: set[str] = set()
        for kind, count in (("output", "completed"), ("errors", "failed")):
            found = _whole_lines(self._state.journal(batch["id"], kind))
            batch["request_counts"][count] = len(found)
            done.update(found)
        return done

    # --- its end

    def _fail(self, batch: Record, problems: list[dict[str, Any]]) -> None:
        told = [{"param": None, "line": None, **problem} for problem in problems]
        errors = {"object": "list", "data": told}
        batch.update(status="failed", failed_at=int(time.time()), errors=errors)
        self._state.save("batches", batch)

    def _finish(self, batch: Record) -> None:
        """Turn the journals into files; may be done again after a crash in its midst."""
        counts = batch["request_counts"]
        status = "completed" if counts["completed"] + counts["failed"] >= counts["total"] else "expired"
        if batch["status"] == "cancelling":
            status = "cancelled"
        elif batch["status"] == "in_progress":
            batch.update(status="finalizing", finalizing_at=int(time.time()))
        for kind, field in (("output", "output_file_id"), ("errors", "error_file_id")):
            self._publish(batch, kind, field)
        batch["status"] = status
        batch[f"{status}_at"] = int(time.time())
        self._state.save("batches", batch)

    def _publish(self, batch: Record, kind: str, field: str) -> None:
        journal = self._state.journal(batch["id"], kind)
        if not journal.exists():
            return
        if not journal.stat().st_size:
            journal.unlink()
            return
        batch[field] = batch[field] or new_id("files")
        self._state.save("batches", batch)
        self._state.add_file(journal, batch[field], batch["key"], f"{batch['id']}_{kind}.jsonl", "batch_output")


def _is_busy(model: ModelService) -> bool:
    return model.state == "ready" and model.engine.stats().num_waiting > 0


def _whole_lines(path: Path) -> list[str]:
    """custom_ids in a journal, which is cut behind its last whole line."""
    if not path.exists():
        return []
    found, end = [], 0
    with path.open("rb+") as file:
        for data in file:
            try:
                custom_id = orjson.loads(data)["custom_id"]
            except orjson.JSONDecodeError:
                break
            end += len(data)
            found.append(custom_id)
        file.truncate(end)
    return found
