"""One streamed request to an OpenAI-compatible server, with the times of its chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import orjson

from llmd_plugins.commands.bench.datasets import BenchRequest
from llmd_plugins.commands.bench.stats import RequestResult

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

_MAX_EVENT_BYTES = 16 << 20
_MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whom to ask, and how."""

    url: str
    model: str
    is_chat: bool
    ignore_eos: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)  # temperature … and whatever --extra-body brings
    max_retries: int = 0  # times that a 429 is waited for and tried again

    def body(self, request: BenchRequest) -> dict[str, Any]:
        """The JSON of a request."""
        body: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.is_chat:
            prompt = request.prompt
            is_messages = isinstance(prompt, list)
            body["messages"] = prompt if is_messages else [{"role": "user", "content": prompt}]
            body["max_completion_tokens"] = request.num_output_tokens
        else:
            body |= {"prompt": request.prompt, "max_tokens": request.num_output_tokens}
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body | dict(self.sampling)


class Refused(Exception):
    """The server answered with an error; `retry_after_s` where it said when to come again."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


async def events(response: ClientResponse) -> AsyncIterator[tuple[float, bytes]]:
    """The data of each server-sent event with the time when its end arrived."""
    buffer = b""
    async for piece in response.content.iter_any():
        now = perf_counter()
        buffer = buffer + piece if buffer else piece
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now, line[5:].strip()
        if len(buffer) > _MAX_EVENT_BYTES:
            raise Refused(f"an event of more than {_MAX_EVENT_BYTES} bytes")


class _Reading:
    """Takes a stream's chunks in and keeps what is measured."""

    def __init__(self, result: RequestResult) -> None:
        self._result = result
        self._first_s = self._last_s = self._seen_s = 0.0
        self._num_chunks = 0
        self._has_usage = self._is_finished = False

    def feed(self, now: float, chunk: dict[str, Any]) -> None:
        """One chunk."""
        if "error" in chunk:
            raise Refused(f"error in the stream: {_message(chunk)}")
        if isinstance(usage := chunk.get("usage"), dict):
            self._has_usage = True
            self._result.num_prompt_tokens = int(usage.get("prompt_tokens") or 0)
            self._result.num_output_tokens = int(usage.get("completion_tokens") or 0)
        for choice in chunk.get("choices") or ():
            self._seen_s = now
            self._is_finished |= choice.get("finish_reason") is not None
            if text := _text_of(choice):
                self._token(now, text)

    def _token(self, now: float, text: str) -> None:
        self._result.text += text
        self._num_chunks += 1
        if not self._first_s:
            self._first_s = now
        else:
            self._result.itls_s.append(now - self._last_s)
        self._last_s = now

    def finish(self, is_done: bool) -> None:
        """The stream ended; `is_done`: with [DONE]."""
        result = self._result
        if not is_done and not self._is_finished:
            raise Refused("the stream ended early")
        if not self._seen_s:
            raise Refused("the stream held no choice")
        result.ttft_s = (self._first_s or self._seen_s) - result.sent_s  # tokens that are no text: the first chunk at all
        result.e2e_s = self._seen_s - result.sent_s
        if not self._has_usage:
            result.is_counted_by_server, result.num_output_tokens = False, self._num_chunks


def _text_of(choice: Mapping[str, Any]) -> str:
    """What a choice of a chunk brings; a chat's first chunk, which only names the role, brings nothing."""
    if "text" in choice:
        return choice["text"] or ""
    delta = choice.get("delta") or {}
    brought = [delta.get(name) for name in ("reasoning_content", "reasoning", "content")]
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        brought += [function.get("name"), function.get("arguments")]
    return "".join(part for part in brought if part)


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:200]


async def _refusal(response: ClientResponse) -> Refused:
    text = await response.text(errors="replace")
    try:
        message = _message(orjson.loads(text))
    except orjson.JSONDecodeError:
        message = _message(text)
    retry_after = response.headers.get("Retry-After", "")
    seconds = float(retry_after) if retry_after.replace(".", "", 1).isdecimal() else None
    return Refused(f"HTTP {response.status}: {message}", seconds if response.status == 429 else None)


async def _attempt(session: ClientSession, target: Target, body: bytes, result: RequestResult) -> None:
    headers = {"Content-Type": "application/json", **target.headers}
    async with session.post(target.url, data=body, headers=headers) as response:
        if response.status != 200:
            raise await _refusal(response)
        reading, is_done = _Reading(result), False
        async for now, data in events(response):
            if data == b"[DONE]":
                is_done = True
                break
            try:
                chunk = orjson.loads(data)
            except orjson.JSONDecodeError:
                raise Refused("a chunk is not JSON") from None
            if not isinstance(chunk, dict):
                raise Refused("a chunk is not a JSON object")
            reading.feed(now, chunk)
        reading.finish(is_done)


async def ask(session: ClientSession, target: Target, request: BenchRequest) -> RequestResult:
    """Send one request and read its answer; whatever goes wrong ends in `error` of the result. Waiting counts as latency."""
    from aiohttp import ClientError

    result = RequestResult(num_prompt_tokens=request.num_prompt_tokens, sent_s=perf_counter())
    body, num_retries = orjson.dumps(target.body(request)), 0
    while True:
        try:
            await _attempt(session, target, body, result)
        except Refused as refused:
            if refused.retry_after_s is not None and num_retries < target.max_retries:
                num_retries += 1
                await asyncio.sleep(min(refused.retry_after_s, _MAX_RETRY_AFTER_S))
                continue
            result.error = str(refused)
        except TimeoutError:
            result.error = "no answer within the timeout"
        except (ClientError, OSError) as error:
            result.error = f"{type(error).__name__}: {_message(str(error)) or 'connection lost'}"
        return result
