"""The demo model behind the OpenAI routes, in this process, with the official client."""

from __future__ import annotations

from contextlib import asynccontextmanager

import openai
from server.serving import make_context, serving

from llmd.config import Config
from llmd.daemon import build_service, load_catalog

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 12},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    "unit": {"enum": ["C", "F"]},
                },
                "required": ["city", "days", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
                           "additionalProperties": False},
        },
    },
]  # fmt: skip
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


@asynccontextmanager
async def demo_served(model=None, **config):
    """Yields a client and the URL of a server with the demo model, or the model of the settings `model`."""
    values = {"models": [{"dtype": "float32", **(model or {})}], "cache": {"kv_cache_bytes": 64 << 20}, **config}
    settings = Config.model_validate(values)
    service = build_service(settings, load_catalog(settings), settings.models[0])
    await service.start(lambda progress: None)
    try:
        async with (
            serving(make_context(service, config=settings)) as url,
            openai.AsyncOpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client,
        ):
            yield client, url
    finally:
        await service.stop()
