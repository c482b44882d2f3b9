"""What the generating routes share: from a validated request to streams of text, and what is known at their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd.api.v1 import (
    EventStream,
    InvalidParams,
    InvalidRequest,
    limit_time,
    open_chat,
    receipt_of,
    refusal_of_end,
    time_limit_s,
    wire_error,
)
from llmd_plugins.openai.constraints import structured_of

if TYPE_CHECKING:
    from llmd.api.v1 import (
        ChatAnswer,
        ChatCall,
        ChatDelta,
        ChatStream,
        LimitsConfig,
        ModelService,
        Receipt,
        SamplingParams,
        ServerContext,
        TextDelta,
    )
    from llmd_plugins.openai.frames import Frames
    from llmd_plugins.openai.protocol import Generation

# Fields that mean the same here and in SamplingParams.
_SAMPLING = (
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "seed",
    "stop", "stop_token_ids", "bad_words", "include_stop_str_in_output", "ignore_eos", "max_tokens", "min_tokens",
    "prompt_logprobs", "skip_special_tokens", "spaces_between_special_tokens", "logit_bias", "allowed_token_ids",
)  # fmt: skip


def check_limits(limits: LimitsConfig, overrides: dict[str, Any]) -> None:
    """What the operator bounds; everything else is checked by SamplingParams."""
    bounds = {
        "n": limits.max_n,
        "best_of": limits.max_n,
        "logprobs": limits.max_logprobs,
        "prompt_logprobs": limits.max_logprobs,
        "max_tokens": limits.max_output_tokens,
    }
    for name, bound in bounds.items():
        value = overrides.get(name)
        if bound is not None and value is not None and value > bound:
            raise InvalidParams(name, value, f"at most {bound}")


def sampling_params(service: ModelService, limits: LimitsConfig, request: Generation, **changes: Any) -> SamplingParams:
    """The request's own fields and `changes`, over the model's defaults. Raises InvalidRequest."""
    overrides = {name: getattr(request, name) for name in _SAMPLING if getattr(request, name) is not None}
    overrides.update(changes)
    check_limits(limits, {**overrides, "best_of": request.best_of})
    if (structured := structured_of(request)) is not None:
        overrides["structured_outputs"] = structured[1]
    if request.best_of is not None and request.best_of > (request.n or 1):
        overrides["n"] = request.best_of
        overrides.setdefault("logprobs", 0)  # to rank them by
    return service.sampling_params(overrides)


def best(answers: Sequence[Any], num: int) -> list[Any]:
    """The `num` answers with the highest mean log-probability a token, counted anew."""

    def mean(answer: Any) -> float:
        logprobs = answer.logprobs or ()
        return sum(entry.logprob for entry in logprobs) / len(logprobs) if logprobs else float("-inf")

    chosen = sorted(answers, key=mean, reverse=True)[:num]
    for index, answer in enumerate(chosen):
        answer.index = index
    return chosen


class Call:
    """One request to a generating route while it is served: its names, its streams, its receipt."""

    def __init__(self, context: ServerContext, request: web.Request, body: Generation, prefix: str) -> None:
        self.context, self.request, self.body = context, request, body
        self.receipt: Receipt = receipt_of(request)
        self.service: ModelService = context.service(body.model)
        self.adapter = context.adapter(body.model)
        self.model = body.model or self.service.names[0]
        self.receipt.model = self.service.names[0]
        limit_time(body.timeout)
        if body.request_id is not None:
            self.receipt.rename(body.request_id)
        self.id = f"{prefix}-{self.receipt.request_id}"
        self.created = int(time.time())
        self.num_choices = body.n or 1  # a prompt
        self.chat: ChatStream | None = None
        self.streams: list[Any] = []  # one a prompt: RequestStream, ChatStream, or BeamSource when all is known
        self.prompt_logprobs: list[list[Any]] = []

    # --- starting

    async def start(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams, add_special_tokens: bool) -> None:
        """Hand the prompts to the engine: all of them, or none and the reason is raised."""
        self.service.engine.check_admission(0, len(prompts) * params.n)
        try:
            for index, prompt in enumerate(prompts):
                await self._start_one(index, await self.cut(prompt, add_special_tokens), params, add_special_tokens)
        except BaseException as error:
            self.close()
            self._name_field(error)
            raise

    async def start_chat(self, call: ChatCall) -> None:
        """Hand a conversation to the engine, or raise the reason why not."""
        try:
            self.chat = await open_chat(self.service, call, **self.options(0))
        except InvalidRequest as error:
            self._name_field(error)
            raise
        self.streams.append(self.chat.plain or self.chat)
        self.receipt.streams.append(self.chat)
        self.prompt_logprobs.append([])

    async def _start_one(self, index: int, prompt: str | Sequence[int], params: SamplingParams, special: bool) -> None:
        stream = await self.service.generate(prompt, params, add_special_tokens=special, **self.options(index))
        self.streams.append(stream)
        self.receipt.streams.append(stream)
        self.prompt_logprobs.append([])

    def options(self, index: int) -> dict[str, Any]:
        """What the engine is told of a prompt beside its text."""
        return {
            "request_id": f"{self.id}-{index}-{id(self):x}",  # a client may use one id twice, the engine may not
            "priority": self.body.priority,
            "timeout_s": time_limit_s(self.context.config),
            "key": self.receipt.key,
            "cache_salt": self.body.cache_salt,
            "adapter": self.adapter,
        }

    def _name_field(self, error: BaseException) -> None:
        """A constraint that cannot be used came in one of several fields: name that one."""
        if isinstance(error, InvalidRequest) and error.param == "structured_outputs":
            structured = structured_of(self.body)
            if structured is not None:
                error.param = structured[0]
                error.message = error.message.replace("structured_outputs", error.param, 1)
                error.args = (error.message,)

    async def cut(self, prompt: str | Sequence[int], add_special_tokens: bool) -> str | Sequence[int]:
        """The last `truncate_prompt_tokens` tokens; -1 means as many as the context holds beside one output token."""
        limit = self.body.truncate_prompt_tokens
        if limit is None:
            return prompt
        if isinstance(prompt, str):
            prompt = await self.service.tokenizer.encode_async(prompt, add_special_tokens=add_special_tokens)
        if limit == -1:
            limit = self.service.max_model_len - 1
        return prompt[-limit:]

    def close(self) -> None:
        """End what still runs: the client left, or something failed."""
        for stream in (*self.streams, *((self.chat,) if self.chat is not None else ())):
            stream.close()

    # --- following

    def note(self, index: int, deltas: Sequence[TextDelta | ChatDelta | ChatAnswer]) -> None:
        """Take down what the news of one prompt say beside their text. Raises what ended the request early."""
        for delta in deltas:
            if delta.prompt_logprobs and not delta.index:  # every sequence scores the prompt anew: one is enough
                self.prompt_logprobs[index].extend(delta.prompt_logprobs)
            if delta.finish_reason is not None:
                self._ended(delta.finish_reason, delta.error)

    def _ended(self, reason: str, error: str | None) -> None:
        """Note the end of a sequence; raises where it is not an end that an answer can tell."""
        self.receipt.finished(str(reason))
        if (refusal := refusal_of_end(self.context, reason, error)) is not None:
            raise refusal

    async def collect(self) -> list[list[TextDelta]]:
        """Wait for the whole answer: one delta for each sequence of each prompt."""
        try:
            answers: list[list[TextDelta]] = await asyncio.gather(*(stream.collect() for stream in self.streams))
        finally:
            self.close()
        for index, answer in enumerate(answers):
            self.note(index, answer)
        return [best(answer, self.num_choices) if self.body.is_ranked else answer for answer in answers]

    async def collect_chat(self) -> list[ChatAnswer]:
        """Wait for the whole answer to a conversation."""
        assert self.chat is not None
        answers = await self.chat.collect()
        self.note(0, answers)
        return best(answers, self.num_choices) if self.body.is_ranked else answers

    # --- answering

    def usage(self, num_output_tokens: int | None = None) -> dict[str, Any]:
        """Tokens of the whole request so far."""
        prompt = sum(len(stream.request.prompt) for stream in self.streams)
        cached = sum(stream.num_cached_tokens for stream in self.streams)
        if num_output_tokens is None:
            num_output_tokens = sum(stream.num_output_tokens for stream in self.streams)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": num_output_tokens,
            "total_tokens": prompt + num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if self.chat is not None and self.service.parsers.reasoning is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.chat.num_reasoning_tokens}
        return usage

    async def stream(self, frames: Frames) -> web.StreamResponse:
        """Send the answer piece by piece; what fails on the way becomes the last event before [DONE]."""
        keepalive_s = self.context.settings("openai").keepalive_s
        try:
            async with EventStream(self.request, keepalive_s=keepalive_s) as events:
                try:
                    await Delivery(self, frames, events).run()
                    await events.send(frames.end() + events.DONE)
                except ConnectionError:
                    raise
                except Exception as error:  # noqa: BLE001  the status line is sent: an event is the only way to tell
                    answer = wire_error(error)
                    self.receipt.failed(answer, error)
                    await events.send(frames.error(answer) + events.DONE)
        finally:
            self.close()
        return events.response


class Delivery:
    """Carries news from the streams of a call to the client's socket.

    A piece is written where it arrives, inside the step's publish: no task is woken for it. The task of the request wakes
    for the first piece (which takes the headers along), while the client is slow, and for the end. What comes while it
    waits for the client is merged by the streams.
    """

    def __init__(self, call: Call, frames: Frames, events: EventStream) -> None:
        self._call, self._frames, self._events = call, frames, events
        self._gaps_s = call.receipt.gaps_s
        self._last_s: list[float | None] = [None] * len(call.streams)
        self._num_open = len(call.streams)
        self._is_waiting = True  # for the client: news stay in the streams
        self._error: Exception | None = None
        self._woken: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Return when every stream has ended and all of it is written. Raises what ended the request early."""
        streams = self._call.streams
        for index, stream in enumerate(streams):
            stream.listen(partial(self._arrived, index))
        try:
            while self._num_open:
                self._is_waiting = True
                await self._events.drain()
                if data := b"".join([self._take(index) for index in range(len(streams))]):
                    await self._events.send(data)
                elif self._num_open:
                    await self._sleep()
                if self._error is not None:
                    raise self._error
        finally:
            for stream in streams:
                stream.listen(None)

    async def _sleep(self) -> None:
        """Let news be written as they come, once the first piece is out."""
        self._is_waiting = not self._events.can_push
        self._woken = asyncio.get_running_loop().create_future()
        await self._woken

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def _arrived(self, index: int) -> None:
        """Called by the stream, in the midst of a step's publish."""
        if self._is_waiting:
            self._wake()
            return
        try:
            data = self._take(index)
            if data and not self._events.push(data):
                self._is_waiting = True
        except Exception as error:  # noqa: BLE001  carried over to the request's own task
            self._error, self._is_waiting = error, True
        if self._is_waiting or not self._num_open:
            self._wake()

    def _take(self, index: int) -> bytes:
        """The events for what is new of one prompt."""
        stream = self._call.streams[index]
        deltas = stream.take()
        if not deltas:
            return b""
        now_s = time.monotonic()
        if (before_s := self._last_s[index]) is not None:
            self._gaps_s.append(now_s - before_s)
        self._last_s[index] = now_s
        if len(deltas) == 1 and (piece := self._frames.plain(index, deltas[0])) is not None:
            return piece
        self._call.note(index, deltas)
        if stream.is_finished:
            self._num_open -= 1
        return self._frames.chunk(index, deltas)


def check_length(name: str, value: Any, limit: int) -> None:
    """A list has at most `limit` entries; looked at before each entry is."""
    if isinstance(value, list) and len(value) > limit:
        raise InvalidRequest(f"{name} must have at most {limit} entries, got {len(value)}", param=name)
