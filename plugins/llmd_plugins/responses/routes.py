"""POST /v1/responses and what can be done with a stored response."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from llmd.api.v1 import (
    EventStream,
    InvalidRequest,
    Overloaded,
    Receipt,
    SamplingParams,
    json_response,
    parse_request,
    read_json_object,
    receipt_of,
    render_conversation,
    wrong_value,
)
from llmd_plugins.responses.conversation import all_items, chat_call, open_response, truncated
from llmd_plugins.responses.protocol import UNSERVED, CountRequest, ResponseRequest, parse_include
from llmd_plugins.responses.reply import Reply
from llmd_plugins.responses.store import Store

if TYPE_CHECKING:
    from llmd.api.v1 import ChatStream, ModelService, ServerContext
    from llmd_plugins.responses.feed import Feed

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_MAX_PAGE = 100
_MAX_SEQUENCE = 1 << 31


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
        if body.request_id is not None:
            receipt.rename(body.request_id)
        service = context.service(body.model)
        receipt.model = service.names[0]
        if body.background and len(store.running) >= (limit := context.settings("responses").max_background):
            raise Overloaded(f"{limit} responses are generated in the background already", retry_after_s=5)
        items, own = all_items(context, store, receipt.key, body)
        chat = await open_response(context, service, body, receipt, items)
        body = body.model_copy(update={"input": own})  # what is stored needs nothing else that is
        if body.background:
            reply = _in_background(context, service, request, body, chat, store)
            return await _follow(request, reply.feed, -1) if reply.feed is not None else json_response(reply.response())
        receipt.streams.append(chat)
        try:
            reply = Reply(context, service, body, chat, receipt, store)
            return await reply.stream(request) if body.stream else json_response(await reply.whole())
        finally:
            chat.close()

    return handle


def count_tokens(context: ServerContext) -> Handler:
    """The handler of POST /v1/responses/input_tokens."""
    store = store_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        body = parse_request(CountRequest, await read_json_object(request), UNSERVED)
        receipt = receipt_of(request)
        service = context.service(body.model)
        receipt.model = service.names[0]
        items, _ = all_items(context, store, receipt.key, body)
        if not items and not body.instructions:
            raise InvalidRequest("input is required", param="input", code="missing_required_parameter")
        call = chat_call(body, items, SamplingParams())
        if body.truncation == "auto":
            call = await truncated(service, call)
        prompt = render_conversation(service, call)
        token_ids = await service.tokenizer.encode_async(prompt, add_special_tokens=False)
        return json_response({"object": "response.input_tokens", "input_tokens": len(token_ids)})

    return handle


# --- in the background


def _in_background(
    context: ServerContext,
    service: ModelService,
    request: web.Request,
    body: ResponseRequest,
    chat: ChatStream,
    store: Store,
) -> Reply:
    """Start it: the queued reply. What is generated has a receipt of its own, for the request's is closed by then."""
    given, receipt = receipt_of(request), Receipt(request)
    receipt.model, receipt.key, receipt.request_id = given.model, given.key, given.request_id
    receipt.streams.append(chat)
    receipt.facts["background"] = True
    context.requests.open(receipt)
    reply = Reply(context, service, body, chat, receipt, store, feed=store.new_feed() if body.stream else None)
    reply.keep("queued")
    name = (reply.key, reply.id)
    task = asyncio.get_running_loop().create_task(_generate(context, reply))
    store.running[name] = task
    task.add_done_callback(lambda _: store.running.pop(name, None))
    return reply


async def _follow(request: web.Request, feed: Feed, after: int) -> web.StreamResponse:
    """The events of a response that goes on whether or not its client stays."""
    feed.check(after)
    async with EventStream(request) as events:
        async for data in feed.follow(after):
            await events.send(data)
    return events.response


async def _generate(context: ServerContext, reply: Reply) -> None:
    status = 200
    try:
        await (reply.whole() if reply.feed is None else reply.publish(reply.feed))
    except asyncio.CancelledError:
        status, reply.receipt.client_gone = 499, True
        raise
    except Exception as error:  # noqa: BLE001  nobody waits for it: the stored response tells
        status = 500
        if reply.feed is None:  # else its last event has told
            reply.fail(error)
    finally:
        reply.chat.close()
        if reply.feed is not None:
            reply.feed.close()
        context.record(reply.receipt, status)


# --- stored ones


def retrieve(context: ServerContext) -> Handler:
    """The handler of GET /v1/responses/{id}."""
    store = store_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        parse_include(request.query.getall("include", []) + request.query.getall("include[]", []))
        stored = store.get(receipt_of(request).key, request.match_info["response_id"])
        streams = request.query.get("stream", "false").lower() not in ("false", "0")
        after = _starting_after(request, streams=streams)
        if not streams:
            return web.Response(body=stored.response, content_type="application/json")
        if stored.feed is None:
            message = "only a response that was created with background=true and stream=true can be streamed again"
            raise InvalidRequest(message, param="stream", code="unsupported_parameter")
        return await _follow(request, stored.feed, after)

    return handle


def _starting_after(request: web.Request, *, streams: bool) -> int:
    """The sequence number of the last event that the client has; −1 is none."""
    text = request.query.get("starting_after")
    if text is None:
        return -1
    if not streams:
        raise InvalidRequest("starting_after is only allowed with stream=true", param="starting_after")
    if not text.isascii() or not text.isdecimal() or len(text) > 10 or int(text) >= _MAX_SEQUENCE:
        raise wrong_value("starting_after", f"an integer between 0 and {_MAX_SEQUENCE - 1}", text)
    return int(text)


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
            store.put(name[0], response, orjson.loads(stored.input_items), stored.feed)
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
