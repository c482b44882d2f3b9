"""The outermost layer of every request: its id, its receipt (exactly one summary each) and its errors.

Who sends `X-Llmd-Receipt: true` is told the receipt too: on a whole answer as a header of that name (JSON) and as
Server-Timing, on a stream as a comment behind the last event.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from llmd.engine.params import SamplingParams
from llmd.log import request_id
from llmd.plugin.specs import RequestSummary
from llmd.server.errors import WireError, error_response, wire_error
from llmd.server.receipts import adapter_of

if TYPE_CHECKING:
    from llmd.engine.request import Request
    from llmd.server.app import ServerContext
    from llmd.server.auth import Principal
    from llmd.text.stream import Progress

logger = logging.getLogger("llmd.server")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

RECEIPT: Any = web.RequestKey("receipt", object) if hasattr(web, "RequestKey") else "llmd.receipt"  # new in aiohttp 3.14
CLIENT_LEFT = "abort"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
CLIENT_GONE = 499  # only ever logged: nobody is left to read it
_MAX_GAPS = 65536
RECEIPT_HEADER = "X-Llmd-Receipt"
_TRACE_HEADERS = ("traceparent", "tracestate")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.{0,64}")  # W3C Trace Context, section 3.2
_MAX_TRACESTATE = 512


class Generated(Protocol):
    """What a receipt wants to know of each prompt: a RequestStream, a ChatStream, or what stands for several of them."""

    @property
    def request(self) -> Request:
        """The request to the engine, for its prompt."""

    @property
    def queued_s(self) -> float | None:
        """When it left the waiting queue."""

    @property
    def first_token_s(self) -> float | None:
        """When its first token came."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated."""

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""

    @property
    def sequences(self) -> Sequence[Progress]:
        """The engine's sequences."""


class Receipt:
    """What is known of one HTTP request; handlers fill it in, the outermost middleware turns it into the summary."""

    __slots__ = (
        "arrived_s", "client_gone", "facts", "finish_reasons", "gaps_s", "headers", "is_wanted", "key", "model", "principal",
        "recorded", "request_id", "route", "started_s", "streams",
    )  # fmt: skip

    def __init__(self, request: web.Request) -> None:
        resource = request.match_info.route.resource
        self.request_id = request_id_of(request)
        self.route = resource.canonical if resource is not None else ""
        self.started_s, self.arrived_s = time.monotonic(), time.time()
        self.model = self.key = ""
        self.principal: Principal | None = None
        self.headers: dict[str, str] = {}  # put on the answer, streamed or not, an error or not
        self.streams: list[Generated] = []
        self.finish_reasons: list[str] = []
        self.gaps_s = array("d")  # between two pieces of one sequence
        self.facts: dict[str, Any] = {"method": request.method, **_trace_of(request)}
        self.client_gone = False
        self.is_wanted = request.headers.get(RECEIPT_HEADER, "").lower() in ("1", "true")  # by the client
        self.recorded: RequestSummary | None = None

    def rename(self, request_id: str) -> None:
        """Take the id that the body asks for; the answer's header follows."""
        self.request_id = request_id
        if "X-Request-Id" in self.headers:
            self.headers["X-Request-Id"] = request_id

    def finished(self, reason: str) -> None:
        """One sequence ended."""
        self.finish_reasons.append(reason)

    def failed(self, answer: WireError, error: BaseException) -> None:
        """The request ended with an error; one that is our own mistake is logged with its traceback."""
        self.facts["error"] = answer.message
        if answer.code == "internal_error":
            logger.error("request %s to %s failed", self.request_id, self.route, exc_info=error)

    def summary(self, status: int) -> RequestSummary:
        """The receipt as everyone else sees it; `itl_s` in the facts are the gaps between pieces of output."""
        now_s, streams = time.monotonic(), self.streams
        sequences = [sequence for stream in streams for sequence in stream.sequences]
        first_s = min((stream.first_token_s for stream in streams if stream.first_token_s is not None), default=None)
        queued_s = self._queued_s(sequences, now_s)
        ends = self.finish_reasons or [CLIENT_LEFT] * (self.client_gone and bool(streams))
        self._note_params()
        if self.gaps_s:
            self.facts["itl_s"] = self.gaps_s[:_MAX_GAPS]
        return RequestSummary(
            request_id=self.request_id,
            model=self.model,
            key=self.key,
            route=self.route,
            status=status,
            finish_reasons=tuple(ends),
            num_prompt_tokens=sum(len(stream.request.prompt) for stream in streams),
            num_cached_tokens=sum(stream.num_cached_tokens for stream in streams),
            num_output_tokens=sum(stream.num_output_tokens for stream in streams),
            queue_s=max(0.0, queued_s - self.started_s) if queued_s is not None else 0.0,
            ttft_s=max(0.0, first_s - self.started_s) if first_s is not None else None,
            e2e_s=now_s - self.started_s,
            client_gone=self.client_gone,
            facts=self.facts,
            adapter=adapter_of(self),
            arrived_s=self.arrived_s,
            prefill_s=max(0.0, first_s - queued_s) if first_s is not None and queued_s is not None else None,
            decode_s=now_s - first_s if first_s is not None else None,
            num_steps=max((sequence.num_steps for sequence in sequences), default=0),
            num_preemptions=sum(sequence.num_preemptions for sequence in sequences),
        )

    def _queued_s(self, sequences: Sequence[Progress], now_s: float) -> float | None:
        """When the first sequence left the queue; now for those that never did, None where nothing was queued."""
        times = [sequence.first_scheduled_s for sequence in sequences if sequence.first_scheduled_s is not None]
        times = times or [stream.queued_s for stream in self.streams if stream.queued_s is not None]
        return min(times) if times else now_s if sequences else None

    def _note_params(self) -> None:
        params = [stream.request.params for stream in self.streams]
        asked = [entry for entry in params if isinstance(entry, SamplingParams)]
        if asked:
            self.facts["n"] = [entry.n for entry in asked]
            self.facts["max_tokens"] = [entry.max_tokens for entry in asked if entry.max_tokens is not None]

    def text(self, status: int = 200) -> str:
        """The receipt as one line of ASCII JSON, for the client; of a stream it is told a moment before its end."""
        fields = (self.recorded or self.summary(status)).fields()
        return json.dumps({name: value for name, value in fields.items() if name not in ("error", "client_gone")})


def request_id_of(request: web.Request) -> str:
    """The client's X-Request-Id where it is short and plain, else a new one."""
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def receipt_of(request: web.Request) -> Receipt:
    """The receipt of a request that is being served."""
    receipt: Receipt = request[RECEIPT]
    return receipt


def _trace_of(request: web.Request) -> dict[str, str]:
    """Who called, by W3C Trace Context, where it says so properly."""
    headers = request.headers
    if "traceparent" not in headers or not _TRACEPARENT.fullmatch(headers["traceparent"]):
        return {}
    return {name: headers[name] for name in _TRACE_HEADERS if 0 < len(headers.get(name, "")) <= _MAX_TRACESTATE}


async def add_response_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Put the receipt's headers (request id, CORS …) on any answer just before it is sent."""
    if (receipt := request.get(RECEIPT)) is None:
        return
    response.headers.update(receipt.headers)
    if receipt.is_wanted and receipt.recorded is not None:
        response.headers[RECEIPT_HEADER] = receipt.text()
        response.headers["Server-Timing"] = server_timing(receipt.recorded)


def server_timing(summary: RequestSummary) -> str:
    """The phases as browsers' tools show them (W3C Server Timing), in milliseconds."""
    phases = {"queue": summary.queue_s, "prefill": summary.prefill_s, "decode": summary.decode_s, "total": summary.e2e_s}
    return ", ".join(f"{name};dur={1000 * seconds:.3f}" for name, seconds in phases.items() if seconds is not None)


def make_outermost_middleware(context: ServerContext) -> Callable[..., Awaitable[web.StreamResponse]]:
    """Open the receipt, answer exceptions in OpenAI's shape, and hand on exactly one summary."""
    return_id = context.config.server.return_request_id

    @web.middleware
    async def outermost(request: web.Request, handler: Handler) -> web.StreamResponse:
        receipt = request[RECEIPT] = Receipt(request)
        request_id.set(receipt.request_id)  # each request is handled in a context of its own
        context.requests.open(receipt)
        if return_id:
            receipt.headers["X-Request-Id"] = receipt.request_id
        status = CLIENT_GONE
        try:
            response = await _answer(request, receipt, handler)
            status = CLIENT_GONE if receipt.client_gone else response.status
            return response
        except asyncio.CancelledError:
            receipt.client_gone = True
            raise
        finally:
            _hand_on(context, receipt, status)

    return outermost


async def _answer(request: web.Request, receipt: Receipt, handler: Handler) -> web.StreamResponse:
    """The handler's response, or the one that its exception stands for."""
    try:
        return await handler(request)
    except ConnectionError:
        receipt.client_gone = True
        return web.Response(status=CLIENT_GONE)
    except Exception as error:  # noqa: BLE001  the border: nothing may pass it as a traceback
        answer = wire_error(error)
        receipt.failed(answer, error)
        return error_response(answer)


def _hand_on(context: ServerContext, receipt: Receipt, status: int) -> None:
    """Tell metrics and plugins; whatever goes wrong there must not reach the client."""
    try:
        receipt.recorded = context.record(receipt, status)
    except Exception:  # a broken listener must not break the answer
        logger.exception("the summary of request %s was not recorded", receipt.request_id)
