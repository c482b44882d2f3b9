"""Every route of the product over a real model in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from server.serving import make_context, serving

from llmd.config import Config
from llmd.daemon import build_service, load_catalog
from llmd.guard import built_routes, guarded, no_service


@asynccontextmanager
async def served_model(path: Path | str, *, model: dict[str, Any] | None = None, **config: Any) -> AsyncIterator[str]:
    """Yields the URL of a server with the model of that folder, in fp32; `config` are tables of the configuration."""
    own = {"model": str(path), "dtype": "float32", "device": "cpu", "served_model_name": ["tiny"], **(model or {})}
    settings = Config.model_validate({"models": [own], "cache": {"kv_cache_bytes": 16 << 20}, **config})
    catalog = load_catalog(settings)
    service = build_service(settings, catalog, settings.models[0])
    await service.start(lambda progress: None)
    specs = guarded(catalog, "services", no_service)
    context = make_context(service, config=settings, routes=[], sections=dict(catalog.settings), service_specs=specs)
    context.routes = built_routes(catalog, context)
    try:
        async with serving(context) as url:
            yield url
    finally:
        await service.stop()
