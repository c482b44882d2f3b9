"""POST /v1/embeddings, /pooling and /classify."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd.api.v1 import ChatCall, PoolingParams, SamplingParams, read_json_object, render_conversation
from llmd_plugins.pooling.call import Call, named, place
from llmd_plugins.pooling.fields import check_length, check_messages, parse
from llmd_plugins.pooling.protocol import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolingRequest,
    TextsRequest,
    VectorsRequest,
)

if TYPE_CHECKING:
    from llmd.api.v1 import Prompt, ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# what other servers call the kinds of input → names that models give their prompts
_INPUT_TYPES = {
    "query": ("query", "search_query"),
    "search_query": ("search_query", "query"),
    "document": ("document", "search_document", "passage"),
    "search_document": ("search_document", "document", "passage"),
    "passage": ("passage", "document", "search_document"),
}


def prompt_name_of(prompts: Mapping[str, str], input_type: str | None) -> str | None:
    """The model's prompt for a kind of input, if it has one."""
    if input_type is None:
        return None
    return next((name for name in _INPUT_TYPES.get(input_type, (input_type,)) if name in prompts), None)


def embeddings(context: ServerContext) -> Handler:
    """The handler of /v1/embeddings."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await _parse(context, request, EmbeddingRequest)
        call = Call(context, request, body, "embd")
        vectors = await _vectors(call, body, _vector_params(body))
        data = [
            {"index": index, "object": "embedding", "embedding": encoded(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        return call.answer(data=data)

    return handle


def pooling(context: ServerContext) -> Handler:
    """The handler of /pooling."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await _parse(context, request, PoolingRequest)
        call = Call(context, request, body, "pool")
        task = body.task or ("classify" if call.service.pooling.labels else "embed")
        if task == "classify":
            params = PoolingParams(task="classify", use_activation=body.use_activation, dimensions=body.dimensions)
        else:
            params = _vector_params(body, pooling="all" if task == "token_embed" else None)
        data = [
            {"index": index, "object": "pooling", "data": encoded(vector, body.encoding_format)}
            for index, vector in enumerate(await _vectors(call, body, params))
        ]
        return call.answer(data=data)

    return handle


def classify(context: ServerContext) -> Handler:
    """The handler of /classify."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await _parse(context, request, ClassifyRequest)
        call = Call(context, request, body, "classify")
        params = PoolingParams(task="classify", use_activation=body.use_activation)
        found = await _vectors(call, body, params)
        labels = call.service.pooling.labels
        data = [
            {"index": index, "label": labels[int(scores.argmax())], "probs": scores, "num_classes": len(labels)}
            for index, scores in enumerate(found)
        ]
        return call.answer(data=data)

    return handle


async def _parse(context: ServerContext, request: web.Request, model: type[Any]) -> Any:
    given = await read_json_object(request)
    check_length("input", given.get("input"), context.config.limits.max_inputs)
    check_messages(given.get("messages"), context.config.limits.max_messages)
    return parse(model, given)


def _vector_params(body: VectorsRequest, pooling: str | None = None) -> PoolingParams:
    return PoolingParams(pooling=pooling, dimensions=body.dimensions, normalize=body.normalize)


async def _vectors(call: Call, body: TextsRequest, params: PoolingParams) -> list[Any]:
    """An array for each input."""
    params = call.service.pooling.params(params)  # before anything is tokenized
    if body.messages is not None:
        return await call.vectors([await _conversation(call, body)], params, ["messages"])
    names = [place("input", index, len(body.input)) for index in range(len(body.input))]
    return await call.vectors(await _prompts(call, body, names), params, names)


async def _prompts(call: Call, body: TextsRequest, names: list[str]) -> list[Prompt]:
    own = call.service.pooling
    prompt_name = None
    if isinstance(body, VectorsRequest):
        prompt_name = body.prompt_name or prompt_name_of(own.defaults.prompts, body.input_type)
    prompts = []
    for name, text in zip(names, body.input, strict=True):
        with named(name):
            made = await own.prompt(
                text,
                prompt_name=prompt_name,
                max_length=body.truncate_prompt_tokens,
                add_special_tokens=body.add_special_tokens is not False,
            )
        prompts.append(made)
    return prompts


async def _conversation(call: Call, body: TextsRequest) -> Prompt:
    """The prompt that the model's chat template makes of the messages."""
    asked = ChatCall(
        messages=body.messages or (),
        params=SamplingParams(),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    text = render_conversation(call.service, asked)
    limit, special = body.truncate_prompt_tokens, body.add_special_tokens is True
    with named("messages"):
        return await call.service.pooling.rendered(text, max_length=limit, add_special_tokens=special)


def encoded(vector: Any, encoding_format: str) -> Any:
    """An array as numbers, or as base64 of little-endian float32."""
    return vector if encoding_format == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
