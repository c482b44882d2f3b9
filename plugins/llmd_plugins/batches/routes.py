"""POST /v1/batches and what can be done with a batch."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd.api.v1 import InvalidRequest, json_response, parse_request, read_json_object, receipt_of
from llmd_plugins.batches.pages import page_of
from llmd_plugins.batches.protocol import UNSERVED, BatchRequest
from llmd_plugins.batches.state import FINAL, Record, State, new_id, shown, state_of

if TYPE_CHECKING:
    from llmd.api.v1 import ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_WINDOW_S = 24 * 3600


def create_batch(context: ServerContext) -> Handler:
    """The handler of POST /v1/batches."""
    state = state_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        body = parse_request(BatchRequest, await read_json_object(request), UNSERVED)
        served = {spec.path for spec in context.routes}
        if body.endpoint not in served:
            raise InvalidRequest(f"endpoint {body.endpoint!r} is not served by this server", param="endpoint")
        key = receipt_of(request).key
        file = state.get("files", body.input_file_id, key)
        state.forget_old_batches()
        batch = _new_batch(body, file["id"], key)
        state.save("batches", batch)
        runner_of(context).add(batch["id"])
        return json_response(shown(batch))

    return handle


def runner_of(context: ServerContext) -> Any:
    """What works on the batches."""
    return context.shared["batches.runner"]


def _new_batch(body: BatchRequest, file_id: str, key: str) -> Record:
    now = int(time.time())
    moments = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")
    return {
        "id": new_id("batches"),
        "object": "batch",
        "endpoint": body.endpoint,
        "errors": None,
        "input_file_id": file_id,
        "completion_window": body.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + _WINDOW_S,
        **dict.fromkeys(moments),
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.metadata,
        "key": key,
    }


def list_batches(context: ServerContext) -> Handler:
    """The handler of GET /v1/batches."""
    state = state_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        return json_response(page_of(state, "batches", request))

    return handle


def show_batch(context: ServerContext) -> Handler:
    """The handler of GET /v1/batches/{batch_id}."""
    state = state_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        return json_response(shown(_asked(state, request)))

    return handle


def cancel_batch(context: ServerContext) -> Handler:
    """The handler of POST /v1/batches/{batch_id}/cancel; one that has ended is shown as it is."""
    state = state_of(context)

    async def handle(request: web.Request) -> web.StreamResponse:
        batch = _asked(state, request)
        if batch["status"] not in (*FINAL, "finalizing", "cancelling"):
            batch.update(status="cancelling", cancelling_at=int(time.time()))
            state.save("batches", batch)
            runner_of(context).cancel(batch["id"])
        return json_response(shown(batch))

    return handle


def _asked(state: State, request: web.Request) -> Record:
    return state.get("batches", request.match_info["batch_id"], receipt_of(request).key)
