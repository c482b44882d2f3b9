"""POST /v1/responses and what can be done with a stored response."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from llmd.api.v1 import (
    ChatCall,
    InvalidParams,
    InvalidRequest,
    Overloaded,
    Receipt,
    SamplingParams,
    StructuredOutputsParams,
    json_response,
    open_chat,
    parse_request,
    read_json_object,
    receipt_of,
    render_conversation,
    wrong_value,
)
from llmd_plugins.responses.items import chat_tool, messages_of
from llmd_plugins.responses.protocol import UNSERVED, ResponseRequest
from llmd_plugins.responses.reply import Reply
from llmd_plugins.responses.store import Store

if TYPE_CHECKING:
    from llmd.api.v1 import ChatStream, ModelService, ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_MAX_PAGE = 100
# where the shared call speaks of a field by another name than this API
_RENAMED = {"structured_outputs": "text.format.schema", "max_tokens": "max_output_tokens", "prompt": "input"}


def store_of(context: ServerContext) -> Store:
    """The one store that the routes share."""
    store = context.shared.get("responses")
    if store is None:
        store = context.shared["responses"] = Store(context.settings("responses"))
    return store


def create(context: ServerContext) -> Handler:
    """The handler of POST /v1/responses."""
    store = store_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        body = parse_request(ResponseRequest, await read_json_object(request), UNSERVED)
        receipt = receipt_of(request)
        service = context.service(body.model)
        receipt.model = service.names[0]
        if body.background and len(store.running) >= (limit := context.settings("responses").max_background):
            raise Overloaded(f"{limit} responses are generated in the background already", retry_after_s=5)
        chat = await _open(context, service, body, receipt, store)
        if body.background:
            return json_response(_in_background(context, request, body, chat, store))
        receipt.streams.append(chat)
        try:
            reply = Reply(context, body, chat, receipt, store)
            return await reply.stream(request) if body.stream else json_response(await reply.whole())
        finally:
            chat.close()

    return handle


# --- to the conversation that every format shares


async def _open(
    context: ServerContext, service: ModelService, body: ResponseRequest, receipt: Receipt, store: Store
) -> ChatStream:
    items = [*store.conversation(receipt.key, body.previous_response_id), *body.input]
    if len(items) > (limit := context.config.limits.max_messages):
        raise InvalidRequest(f"input must have at most {limit} items with those before it, got {len(items)}", param="input")
    options: dict[str, Any] = {"key": receipt.key, "timeout_s": context.config.server.request_timeout_s}
    name = f"resp-{receipt.request_id}-{id(body):x}"
    try:
        call = _chat_call(body, messages_of(items, body.instructions), _params(context, service, body))
        if body.truncation == "auto":
            call = await _truncated(service, call)
        try:
            return await open_chat(service, call, request_id=name, **options)
        except InvalidRequest as error:
            if (error.param, error.code) != ("max_tokens", "context_length_exceeded"):
                raise
        # clients ask for more output than small contexts hold: they get what is left
        return await open_chat(
            service, replace(call, params=replace(call.params, max_tokens=None)), request_id=name, **options
        )
    except InvalidRequest as error:
        if (renamed := _RENAMED.get(error.param or "")) is None:
            raise
        words = error.message if error.param == "prompt" else error.message.replace(error.param or "", renamed, 1)
        raise InvalidRequest(words, param=renamed, code=error.code) from None


def _params(context: ServerContext, service: ModelService, body: ResponseRequest) -> SamplingParams:
    limit = context.config.limits.max_output_tokens
    if limit is not None and (body.max_output_tokens or 0) > limit:
        raise InvalidParams("max_output_tokens", body.max_output_tokens, f"at most {limit}")
    overrides: dict[str, Any] = {"max_tokens": body.max_output_tokens}
    for name, value in (("temperature", body.temperature), ("top_p", body.top_p)):
        if value is not None:
            overrides[name] = value
    form = body.text.format if body.text is not None else None
    if form is not None and form.type == "json_schema":
        overrides["structured_outputs"] = StructuredOutputsParams(json=form.schema_)
    elif form is not None and form.type == "json_object":
        overrides["structured_outputs"] = StructuredOutputsParams(json_object=True)
    return service.sampling_params(overrides)


def _chat_call(body: ResponseRequest, messages: list[dict[str, Any]], params: SamplingParams) -> ChatCall:
    choice = body.tool_choice
    return ChatCall(
        messages=messages,
        params=params,
        tools=[chat_tool(tool) for tool in body.tools] if body.tools else None,
        tool_choice=choice["name"] if isinstance(choice, dict) else choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
    )


async def _truncated(service: ModelService, call: ChatCall) -> ChatCall:
    """The call without the oldest turns that the context cannot hold; system messages and the last turn stay."""
    kept = [message for message in call.messages if message["role"] in ("system", "developer")]
    rest = [message for message in call.messages if message["role"] not in ("system", "developer")]
    starts = [index for index, message in enumerate(rest) if message["role"] == "user"]
    room = service.max_model_len - min(call.params.max_tokens or 1, service.max_model_len // 2)

    async def fits(candidate: ChatCall) -> bool:
        prompt = render_conversation(service, candidate)
        return len(await service.tokenizer.encode_async(prompt, add_special_tokens=False)) <= room

    shorter = [replace(call, messages=[*kept, *rest[start:]]) for start in starts]
    if not shorter or await fits(call):
        return call
    low, high = 0, len(shorter) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await fits(shorter[middle]) else (middle + 1, high)
    return shorter[low]


# --- in the background


def _in_background(
    context: ServerContext, request: web.Request, body: ResponseRequest, chat: ChatStream, store: Store
) -> dict[str, Any]:
    """Start it: the queued response. What is generated has a receipt of its own, for the request's is closed by then."""
    given, receipt = receipt_of(request), Receipt(request)
    receipt.model, receipt.key, receipt.request_id = given.model, given.key, given.request_id
    receipt.streams.append(chat)
    receipt.facts["background"] = True
    reply = Reply(context, body, chat, receipt, store)
    queued = reply.keep("queued")
    name = (reply.key, reply.id)
    task = asyncio.get_running_loop().create_task(_generate(context, reply))
    store.running[name] = task
    task.add_done_callback(lambda _: store.running.pop(name, None))
    return queued


async def _generate(context: ServerContext, reply: Reply) -> None:
    status = 200
    try:
        reply.keep("in_progress")
        await reply.whole()
    except asyncio.CancelledError:
        status, reply.receipt.client_gone = 499, True
        raise
    except Exception as error:  # noqa: BLE001  nobody waits for it: the stored response tells
        status = 500
        reply.fail(error)
    finally:
        reply.chat.close()
        summary = reply.receipt.summary(status)
        context.metrics.observe(summary)
        context.request_finished(summary)


# --- stored ones


def retrieve(context: ServerContext) -> Handler:
    """The handler of GET /v1/responses/{id}."""
    store = store_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.query.get("stream", "false").lower() not in ("false", "0"):
            message = "a stored response is not streamed again: leave stream out"
            raise InvalidRequest(message, param="stream", code="unsupported_parameter")
        stored = store.get(receipt_of(request).key, request.match_info["response_id"])
        return web.Response(body=stored.response, content_type="application/json")

    return handle


def delete(context: ServerContext) -> Handler:
    """The handler of DELETE /v1/responses/{id}."""
    store = store_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        response_id = request.match_info["response_id"]
        store.delete(receipt_of(request).key, response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    return handle


def cancel(context: ServerContext) -> Handler:
    """The handler of POST /v1/responses/{id}/cancel; one that is over is answered as it is."""
    store = store_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        name = (receipt_of(request).key, request.match_info["response_id"])
        stored = store.get(*name)
        response = orjson.loads(stored.response)
        if not response["background"]:
            raise InvalidRequest("only a response with background=true can be cancelled", param="response_id")
        if (task := store.running.get(name)) is not None:
            task.cancel()
            response["status"] = "cancelled"
            store.put(name[0], response, orjson.loads(stored.input_items))
        return json_response(response)

    return handle


def input_items(context: ServerContext) -> Handler:
    """The handler of GET /v1/responses/{id}/input_items."""
    store = store_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        stored = store.get(receipt_of(request).key, request.match_info["response_id"])
        items = orjson.loads(stored.input_items)
        if _order(request) == "desc":
            items.reverse()
        if (after := request.query.get("after")) is not None:
            place = next((index for index, item in enumerate(items) if item["id"] == after), None)
            if place is None:
                raise wrong_value("after", "the id of one of the items", after)
            items = items[place + 1 :]
        limit = _limit(request)
        page = items[:limit]
        ids = [item["id"] for item in page]
        ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
        return json_response({"object": "list", "data": page, **ends, "has_more": len(items) > limit})

    return handle


def _order(request: web.Request) -> str:
    order = request.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise wrong_value("order", "'asc' or 'desc'", order)
    return order


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", "20")
    if not text.isascii() or not text.isdecimal() or len(text) > 4 or not 1 <= int(text) <= _MAX_PAGE:
        raise wrong_value("limit", f"an integer between 1 and {_MAX_PAGE}", text)
    return int(text)
