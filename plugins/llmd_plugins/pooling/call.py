"""What the routes share: from checked prompts to vectors, exactly one receipt, and an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from aiohttp import web

from llmd.api.v1 import (
    FinishReason,
    InvalidRequest,
    NotReady,
    RequestRefused,
    limit_time,
    receipt_of,
    refusal_of_end,
    time_limit_s,
)

if TYPE_CHECKING:
    from llmd.api.v1 import ModelService, PoolingParams, Prompt, Receipt, RequestStream, ServerContext, TextDelta
    from llmd_plugins.pooling.protocol import Common


class Call:
    """One request while it is served: its names, its streams, its receipt."""

    def __init__(self, context: ServerContext, request: web.Request, body: Common, prefix: str) -> None:
        self.context, self.body = context, body
        self.receipt: Receipt = receipt_of(request)
        self.service: ModelService = context.service(body.model)
        self.model = body.model or self.service.names[0]
        self.receipt.model = self.service.names[0]
        limit_time(body.timeout)
        if body.request_id is not None:
            self.receipt.rename(body.request_id)
        self.id = f"{prefix}-{self.receipt.request_id}"
        self.created = int(time.time())

    async def vectors(self, prompts: Sequence[Prompt], params: PoolingParams, names: Sequence[str]) -> list[Any]:
        """A float32 array for each prompt; `names` say where in the body each came from. All of them, or an error."""
        self.service.engine.check_admission(0, len(prompts))
        streams: list[RequestStream] = []
        try:
            for name, prompt in zip(names, prompts, strict=True):
                with named(name):
                    self.service.check(prompt.token_ids, params)
            for index, prompt in enumerate(prompts):
                stream = await self._start(index, prompt, params)
                streams.append(stream)
                self.receipt.streams.append(stream)
            answers = await asyncio.gather(*(stream.collect() for stream in streams))
        finally:
            for stream in streams:
                stream.close()
        return [self._ended(stream, answer) for stream, answer in zip(streams, answers, strict=True)]

    async def _start(self, index: int, prompt: Prompt, params: PoolingParams) -> RequestStream:
        return await self.service.embed(
            prompt,
            params,
            request_id=f"{self.id}-{index}-{id(self):x}-{len(self.receipt.streams)}",
            priority=self.body.priority,
            timeout_s=time_limit_s(self.context.config),
            key=self.receipt.key,
            adapter=self.context.adapter(self.body.model),
        )

    def _ended(self, stream: RequestStream, answer: list[TextDelta]) -> Any:
        """The vector of a stream that has ended. Raises what ended it otherwise."""
        if stream.error is not None:
            raise stream.error
        delta = answer[0]
        reason = delta.finish_reason
        self.receipt.finished(str(reason))
        if (refusal := refusal_of_end(self.context, reason, delta.error)) is not None:
            raise refusal
        if reason is FinishReason.ABORT:
            raise NotReady(f"the server is {self.context.state}")
        if delta.pooled is None:
            message = f"the request failed: {delta.error or 'unknown reason'}"
            raise RequestRefused(500, message, type="server_error", code="generation_failed")
        return np.asarray(delta.pooled, np.float32)

    def usage(self) -> dict[str, int]:
        """Tokens of all prompts."""
        count = sum(len(stream.request.prompt) for stream in self.receipt.streams)
        return {"prompt_tokens": count, "total_tokens": count}

    def answer(self, **fields: Any) -> web.Response:
        """The whole answer; arrays go as lists of numbers."""
        payload = {"id": self.id, "object": "list", "created": self.created, "model": self.model, **fields}
        body = orjson.dumps({**payload, "usage": self.usage()}, option=orjson.OPT_SERIALIZE_NUMPY)
        return web.Response(body=body, content_type="application/json")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Within it, an error about the prompt names the field that the prompt came from."""
    try:
        yield
    except InvalidRequest as error:
        if error.param != "prompt":
            raise
        raise InvalidRequest(f"{name}: {error.message}", param=name, code=error.code) from error


def place(name: str, index: int, count: int) -> str:
    """`input[3]`, or `input` where there is only one."""
    return f"{name}[{index}]" if count > 1 else name
