"""One response while it is made: its object, its events, its end."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from llmd.api.v1 import EventStream, NotReady, ToolCallDelta, refusal_of_end, wire_error
from llmd_plugins.responses.items import new_id
from llmd_plugins.responses.logprobs import LogprobFormat
from llmd_plugins.responses.output import Event, Output

if TYPE_CHECKING:
    from llmd.api.v1 import ChatAnswer, ChatDelta, ChatStream, ModelService, Receipt, ServerContext
    from llmd_plugins.responses.feed import Feed
    from llmd_plugins.responses.protocol import ResponseRequest
    from llmd_plugins.responses.store import Store


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"description": None, "parameters": None, "strict": None, **tool}


def _text(body: ResponseRequest) -> dict[str, Any]:
    form = body.text.format if body.text is not None else None
    shown = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
    return {"format": shown, "verbosity": (body.text.verbosity if body.text is not None else None) or "medium"}


class Reply:
    """The response to one request."""

    def __init__(
        self,
        context: ServerContext,
        service: ModelService,
        body: ResponseRequest,
        chat: ChatStream,
        receipt: Receipt,
        store: Store,
        *,
        feed: Feed | None = None,
    ) -> None:
        self.feed = feed  # where its events are kept, if it is streamed in the background
        self.context, self.body, self.chat, self.receipt, self.store = context, body, chat, receipt, store
        self.id = new_id("resp")
        self.key = receipt.key
        self.output = Output()
        self._model = body.model or receipt.model
        self._created = int(time.time())
        self._status = "in_progress"
        self._usage: dict[str, Any] | None = None
        self._error: dict[str, str] | None = None
        self._incomplete: dict[str, str] | None = None
        self._num_events = 0
        self._logprobs = LogprobFormat(service, body.top_logprobs or 0) if body.wants_logprobs else None

    # --- the object

    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        body, params, status = self.body, self.chat.request.params, self._status
        effort = body.reasoning.effort if body.reasoning is not None else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": bool(body.background),
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": self._error,
            "incomplete_details": self._incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": self.output.items if status not in ("queued", "in_progress") else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": getattr(params, "temperature", None),
            "text": _text(body),
            "tool_choice": body.tool_choice or "auto",
            "tools": [_tool(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": getattr(params, "top_p", None),
            "truncation": body.truncation or "disabled",
            "usage": self._usage,
            "user": body.user,
        }

    def keep(self, status: str | None = None) -> dict[str, Any]:
        """The response, which the store keeps unless the client wants it not to."""
        self._status = status or self._status
        response = self.response()
        if self.body.store is not False:
            self.store.put(self.key, response, self.body.input, self.feed)
        return response

    def _count(self) -> dict[str, Any]:
        num_input, num_output = len(self.chat.prompt_token_ids), self.chat.num_output_tokens
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": self.chat.num_cached_tokens},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": self.chat.num_reasoning_tokens},
            "total_tokens": num_input + num_output,
        }

    # --- its end

    def _finish(self, end: ChatAnswer | ChatDelta) -> list[Event]:
        """Close what is open and take down how it ended; raises where that is no end that an answer can tell."""
        reason = str(end.finish_reason)
        self.receipt.finished(reason)
        self._usage = self._count()
        if (refusal := refusal_of_end(self.context, reason, end.error)) is not None:
            raise refusal
        if reason == "abort":
            raise NotReady(f"the server is {self.context.state}")
        is_cut = reason == "length"
        self._status = "incomplete" if is_cut else "completed"
        self._incomplete = {"reason": "max_output_tokens"} if is_cut else None
        return self.output.close(self._status)

    def fail(self, error: BaseException) -> dict[str, Any]:
        """The response that tells of an error."""
        answer = wire_error(error)
        self.receipt.failed(answer, error)
        self.output.close("incomplete")
        self._status, self._error = "failed", {"code": "server_error", "message": answer.message}
        return self.keep()

    # --- whole

    async def whole(self) -> dict[str, Any]:
        """Wait for the end: the finished response. Raises what ended it early."""
        if self._status == "queued":
            self.keep("in_progress")
        if self._logprobs is not None:  # each part of the answer has its own
            async for deltas in self.chat:
                for delta in deltas:
                    self._events(delta)
            return self.response()
        (answer,) = await self.chat.collect()
        if answer.reasoning:
            self.output.reasoning(answer.reasoning)
        if answer.content:
            self.output.text(answer.content)
        for index, call in enumerate(answer.tool_calls):
            self.output.tool_call(ToolCallDelta(index, call.id, call.name, call.arguments))
        self._finish(answer)
        return self.keep()

    # --- streamed

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Send the events; what fails on the way is told by response.failed."""
        async with EventStream(request) as events:
            try:
                async for frames in self._batches():
                    await events.send(b"".join(frames))
            except ConnectionError:
                raise
            except Exception as error:  # noqa: BLE001  the status line is sent: an event is the only way to tell
                await events.send(b"".join(self._failure(error)))
        return events.response

    async def publish(self, feed: Feed) -> None:
        """Keep the events for who follows them; what fails on the way is told by response.failed, and raised."""
        feed.add(self._frames([{"type": f"response.{name}", "response": self.response()} for name in ("created", "queued")]))
        self.keep("in_progress")
        try:
            async for frames in self._batches(("in_progress",)):
                feed.add(frames)
        except Exception as error:
            feed.add(self._failure(error))
            raise

    def _failure(self, error: BaseException) -> list[bytes]:
        return self._frames([{"type": "response.failed", "response": self.fail(error)}])

    async def _batches(self, head: Sequence[str] = ("created", "in_progress")) -> AsyncIterator[list[bytes]]:
        """The events, those that come at once together; `head` goes before the first."""
        begun: list[Event] = [{"type": f"response.{name}", "response": self.response()} for name in head]
        last_s: float | None = None
        async for deltas in self.chat:
            now_s = time.monotonic()
            if last_s is not None:
                self.receipt.gaps_s.append(now_s - last_s)
            last_s = now_s
            news = begun + [event for delta in deltas for event in self._events(delta)]
            begun = []
            if news:
                yield self._frames(news)

    def _events(self, delta: ChatDelta) -> list[Event]:
        events: list[Event] = []
        if delta.reasoning:
            events += self.output.reasoning(delta.reasoning)
        elif delta.content:
            entries = self._logprobs.entries(delta.logprobs or ()) if self._logprobs is not None else ()
            events += self.output.text(delta.content, entries)
        elif delta.tool_call is not None:
            events += self.output.tool_call(delta.tool_call)
        if delta.finish_reason is not None:
            events += self._finish(delta)
            events.append({"type": f"response.{self._status}", "response": self.keep()})
        return events

    def _frames(self, events: list[Event]) -> list[bytes]:
        frames = []
        for event in events:
            numbered = {**event, "sequence_number": self._num_events}
            self._num_events += 1
            frames.append(b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(numbered) + b"\n\n")
        return frames
