"""All routes of the product over a model whose device is fake: what it says depends on the adapter's path."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
from fakes import FakeExecutor, fake_info
from made_tokenizers import write_folder
from server.serving import make_context, serving, summaries_of

from llmd.config import Config
from llmd.daemon import adapter_sources, load_catalog
from llmd.guard import built_routes, guarded, no_service
from llmd.server.app import ServerContext
from llmd.server.generate import ModelService

ADMIN = {"Authorization": "Bearer adm"}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


class World(NamedTuple):
    """A server and what is behind it."""

    url: str
    context: ServerContext
    service: ModelService
    executor: FakeExecutor
    summaries: list[Any]

    async def call(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, JSON or text) of a POST, or of a GET where there is no body."""
        method = "GET" if body is None else "POST"
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.url + path, json=body, headers=headers) as answer,
        ):
            return answer.status, await (answer.json() if "json" in answer.content_type else answer.text())

    async def load(self, name: str, path: Any, **more: Any) -> tuple[int, Any]:
        """Load an adapter with the admin's key."""
        return await self.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more}, **ADMIN)

    async def unload(self, name: str) -> tuple[int, Any]:
        """Unload one."""
        return await self.call("/v1/unload_lora_adapter", {"lora_name": name}, **ADMIN)

    async def say(self, model: str, **fields: Any) -> tuple[int, Any]:
        """A completion."""
        body = {"model": model, "prompt": "hello", "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields}
        return await self.call("/v1/completions", body)


@asynccontextmanager
async def served(
    folder: Any, *, step_s: float = 0.0, num_slots: int = 2, broken: Sequence[Any] = (), tables: Any = None, **adapters: Any
) -> AsyncIterator[World]:
    """`adapters` are keys of [adapters], `tables` other ones of the configuration, `broken` folders cannot be read."""
    path = write_folder("byte_level", folder / "model", chat_template=TEMPLATE)
    (path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    config = Config.model_validate(
        {
            "models": [{"model": str(path), "served_model_name": ["tiny"]}],
            "adapters": {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 4, **adapters},
            "server": {"admin_keys": ["adm"]},
            **(tables or {}),
        }
    )
    catalog = load_catalog(config)
    executor = FakeExecutor(fake_info(vocab_size=422, max_loras=num_slots, max_cpu_loras=2 * num_slots), step_s=step_s)
    executor.broken_adapters |= set(map(str, broken))
    waiting = catalog.scheduling_policies["fair"].build(config.scheduler)
    model = config.models[0]
    sources = adapter_sources(catalog, model)
    service = ModelService.create(config, model, path, executor, waiting, adapters=sources)
    await service.start(lambda progress: None)
    specs = guarded(catalog, "services", no_service)
    context = make_context(service, config=config, routes=[], sections=dict(catalog.settings), service_specs=specs)
    context.routes = built_routes(catalog, context)
    service.quotas = context.quotas
    try:
        async with serving(context) as url:
            yield World(url, context, service, executor, summaries_of(context))
    finally:
        await service.stop()
