"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from llmd.api.v1 import (
    ChatCall,
    EventStream,
    InvalidParams,
    InvalidRequest,
    NotReady,
    SamplingParams,
    StructuredOutputsParams,
    ToolCallDelta,
    json_response,
    list_at,
    open_chat,
    parse_request,
    read_json_object,
    receipt_of,
    refusal_of_end,
    render_conversation,
    time_limit_s,
    wire_error,
)
from llmd_plugins.anthropic.blocks import Blocks, Event, content_of
from llmd_plugins.anthropic.errors import error_body
from llmd_plugins.anthropic.messages import joined
from llmd_plugins.anthropic.protocol import UNSERVED, CountTokensRequest, MessagesRequest

if TYPE_CHECKING:
    from llmd.api.v1 import ChatAnswer, ChatDelta, ChatStream, ModelService, ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# where the shared call speaks of a field by another name than this API
_RENAMED = {
    "stop": "stop_sequences",
    "structured_outputs": "output_config.format",
    "thinking_token_budget": "thinking.budget_tokens",
}


def messages(context: ServerContext) -> Handler:
    """The handler that answers a conversation."""

    async def handle(request: web.Request) -> web.StreamResponse:
        given = await read_json_object(request)
        list_at("messages", given.get("messages") or [], context.config.limits.max_messages)
        body = parse_request(MessagesRequest, given, UNSERVED)
        receipt = receipt_of(request)
        service = context.service(body.model)
        receipt.model = service.names[0]
        chat = await _open(context, service, body, f"msg_{receipt.request_id}-{id(request):x}", receipt.key)
        receipt.streams.append(chat)
        reply = Reply(context, request, body, chat, service)
        try:
            return await (reply.stream() if body.stream else reply.whole())
        finally:
            chat.close()

    return handle


def count_tokens(context: ServerContext) -> Handler:
    """The handler that counts the tokens of a prompt and generates nothing."""

    async def handle(request: web.Request) -> web.StreamResponse:
        given = await read_json_object(request)
        list_at("messages", given.get("messages") or [], context.config.limits.max_messages)
        body = parse_request(CountTokensRequest, given, UNSERVED)
        service = context.service(body.model)
        receipt_of(request).model = service.names[0]
        prompt = render_conversation(service, _chat_call(service, body, SamplingParams()))
        token_ids = await service.tokenizer.encode_async(prompt, add_special_tokens=False)
        return json_response({"input_tokens": len(token_ids)})

    return handle


# --- to the conversation that every format shares


async def _open(
    context: ServerContext, service: ModelService, body: MessagesRequest, request_id: str, key: str
) -> ChatStream:
    """Queue it. Clients ask for more output than small contexts hold: what is left of the context is what they get."""
    options: dict[str, Any] = {
        "request_id": request_id,
        "key": key,
        "priority": body.priority,
        "timeout_s": time_limit_s(context.config),
        "adapter": context.adapter(body.model),
    }
    try:
        call = _chat_call(service, body, _params(context, service, body))
        try:
            return await open_chat(service, call, **options)
        except InvalidRequest as error:
            if (error.param, error.code) != ("max_tokens", "context_length_exceeded"):
                raise
        call = replace(call, params=replace(call.params, max_tokens=None))
        return await open_chat(service, call, **options)
    except InvalidRequest as error:
        if (name := _RENAMED.get(error.param or "")) is None:
            raise
        raise InvalidRequest(error.message.replace(error.param or "", name, 1), param=name, code=error.code) from None


def _params(context: ServerContext, service: ModelService, body: MessagesRequest) -> SamplingParams:
    limit = context.config.limits.max_output_tokens
    if limit is not None and body.max_tokens > limit:
        raise InvalidParams("max_tokens", body.max_tokens, f"at most {limit}")
    overrides: dict[str, Any] = {"max_tokens": body.max_tokens}
    for name, value in (("temperature", body.temperature), ("top_p", body.top_p), ("top_k", body.top_k)):
        if value is not None:
            overrides[name] = value
    if body.stop_sequences:
        overrides["stop"] = body.stop_sequences
    if body.output_config is not None and body.output_config.format is not None:
        overrides["structured_outputs"] = StructuredOutputsParams(json=body.output_config.format.schema_)
    return service.sampling_params(overrides)


def _chat_call(service: ModelService, body: CountTokensRequest, params: SamplingParams) -> ChatCall:
    """Thinking that was not asked for is switched off where the template can, and not shown where it cannot."""
    system = [{"role": "system", "content": joined(body.system)}] if body.system else []
    thinking, choice = body.thinking, body.tool_choice
    thinks = thinking is not None and thinking.type != "disabled"
    effort = body.output_config.effort if body.output_config is not None else None
    budget = thinking.budget_tokens if thinking is not None and thinks and service.parsers.reasoning is not None else None
    return ChatCall(
        messages=[*system, *body.messages],
        params=params,
        tools=body.tools,
        tool_choice=choice.name or choice.mode,
        parallel_tool_calls=choice.is_parallel,
        include_reasoning=thinks,
        thinking_token_budget=budget,
        reasoning_effort=(effort or "medium") if thinks else "none",
        continue_final_message=body.messages[-1]["role"] == "assistant",
    )


# --- the answer


def _event(event: Event) -> bytes:
    return b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


class Reply:
    """One message as it is answered, in pieces or whole."""

    def __init__(
        self, context: ServerContext, request: web.Request, body: MessagesRequest, chat: ChatStream, service: ModelService
    ) -> None:
        self.context, self.request, self.body, self.chat, self.service = context, request, body, chat, service
        self.receipt = receipt_of(request)
        self.id = f"msg_{self.receipt.request_id}"
        shows = body.thinking is not None and body.thinking.type != "disabled" and body.thinking.display != "omitted"
        self.blocks = Blocks(self.id if shows else None)

    # --- whole

    async def whole(self) -> web.Response:
        """The message as one JSON object."""
        (answer,) = await self.chat.collect()
        self._ended(answer)
        events = self.blocks.thinking(answer.reasoning) if answer.reasoning else []
        events += self.blocks.text(answer.content) if answer.content else []
        for index, call in enumerate(answer.tool_calls):
            events += self.blocks.tool_call(ToolCallDelta(index, call.id, call.name, call.arguments))
        message = self._message(content_of(events + self.blocks.finish()))
        return json_response({**message, **self._stop(answer), "usage": self._usage()})

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.body.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        """What was read from the cache is not counted as input, as Anthropic counts."""
        num_cached = self.chat.num_cached_tokens
        return {
            "input_tokens": len(self.chat.prompt_token_ids) - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": self.chat.num_output_tokens,
        }

    def _stop(self, end: ChatAnswer | ChatDelta) -> dict[str, str | None]:
        """Why it stopped."""
        if end.finish_reason == "tool_calls":
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if end.finish_reason == "length":
            is_full = self.chat.num_output_tokens < self.body.max_tokens
            return {"stop_reason": "model_context_window_exceeded" if is_full else "max_tokens", "stop_sequence": None}
        if isinstance(end.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": end.stop_reason}
        return {"stop_reason": "end_turn", "stop_sequence": None}

    def _ended(self, end: ChatAnswer | ChatDelta) -> None:
        """Note the end; raises where it is not one that an answer can tell."""
        reason = str(end.finish_reason)
        self.receipt.finished(reason)
        if (refusal := refusal_of_end(self.context, reason, end.error)) is not None:
            raise refusal
        if reason == "abort":
            raise NotReady(f"the server is {self.context.state}")

    # --- streamed

    async def stream(self) -> web.StreamResponse:
        """The message as events; what fails on the way is the last one."""
        async with EventStream(self.request) as events:
            try:
                await self._send_all(events)
            except ConnectionError:
                raise
            except Exception as error:  # noqa: BLE001  the status line is sent: an event is the only way to tell
                answer = wire_error(error)
                self.receipt.failed(answer, error)
                data = error_body(answer.status, answer.message, self.receipt.request_id)
                await events.send(b"event: error\ndata: " + data + b"\n\n")
        return events.response

    async def _send_all(self, events: EventStream) -> None:
        head = True
        last_s: float | None = None
        async for deltas in self.chat:
            now_s = time.monotonic()
            if last_s is not None:
                self.receipt.gaps_s.append(now_s - last_s)
            last_s = now_s
            frames = [frame for delta in deltas for frame in self._frames(delta)]
            if head and frames:
                frames = [{"type": "message_start", "message": self._message([])}, {"type": "ping"}, *frames]
                head = False
            if frames:
                await events.send(b"".join(map(_event, frames)))

    def _frames(self, delta: ChatDelta) -> list[Event]:
        frames: list[Event] = []
        if delta.reasoning:
            frames += self.blocks.thinking(delta.reasoning)
        elif delta.content:
            frames += self.blocks.text(delta.content)
        elif delta.tool_call is not None:
            frames += self.blocks.tool_call(delta.tool_call)
        if delta.finish_reason is not None:
            self._ended(delta)
            frames += self.blocks.finish()
            frames.append({"type": "message_delta", "delta": self._stop(delta), "usage": self._usage()})
            frames.append({"type": "message_stop"})
        return frames
