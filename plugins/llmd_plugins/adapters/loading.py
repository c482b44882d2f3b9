"""What the routes that load and unload adapters take, check and answer, in vLLM's words."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web
from pydantic import Field

from llmd.api.v1 import (
    AdapterError,
    AdapterNotFound,
    InvalidRequest,
    RequestFields,
    RequestRefused,
    error_responses,
    json_operation,
    parse_request,
    read_json_object,
)

if TYPE_CHECKING:
    from llmd.api.v1 import AdaptersConfig, ModelService, ServerContext

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class LoadAdapterRequest(RequestFields):
    """POST /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256, description="what requests will name as their model")
    lora_path: str = Field(min_length=1, max_length=4096, description="its folder, below adapters.lora_allowed_roots")
    load_inplace: bool = Field(False, description="replace the adapter of that name; its running requests end with it")


class UnloadAdapterRequest(RequestFields):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256, description="the adapter's name")


_UNSERVED: dict[str, dict[str, tuple[Any, ...]]] = {
    "load": {"is_3d_lora_weight": (False,), "base_model_name": ()},
    "unload": {"lora_int_id": ()},
}


def load(context: ServerContext) -> Handler:
    """The handler that loads an adapter: it answers when requests may ask for it."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = parse_request(LoadAdapterRequest, await read_json_object(request), _UNSERVED["load"])
        service = _service(context)
        if body.lora_name in context.services:
            raise InvalidRequest(f"lora_name {body.lora_name!r} is the name of a served model", param="lora_name")
        if not body.load_inplace and service.adapters.has(body.lora_name):
            message = f"adapter {body.lora_name!r} has already been loaded; load_inplace = true replaces it"
            raise InvalidRequest(message, param="lora_name", code="adapter_exists")
        path = await asyncio.to_thread(allowed_path, context.config.adapters, body.lora_path)
        await service.adapters.load(body.lora_name, str(path), replace=body.load_inplace)
        return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    return handle


def unload(context: ServerContext) -> Handler:
    """The handler that unloads an adapter: it answers when the last request that uses it has ended."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = parse_request(UnloadAdapterRequest, await read_json_object(request), _UNSERVED["unload"])
        service = _service(context)
        if not service.adapters.has(body.lora_name):
            message = f"no adapter is named {body.lora_name!r}"
            raise AdapterNotFound(message, param="lora_name", code="adapter_not_found")
        await service.adapters.unload(body.lora_name)
        return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return handle


def _service(context: ServerContext) -> ModelService:
    """The model that adapters change. Raises NotReady while it loads, AdapterError where there is none."""
    context.service()
    service = next((service for service in context.models() if service.adapters.is_enabled), None)
    if service is None:
        raise AdapterError("adapters are not served: adapters.enable_lora is off", code="adapters_off")
    return service


def allowed_path(config: AdaptersConfig, given: str) -> Path:
    """The folder with all links followed. Raises RequestRefused where it is not below one of the allowed roots.

    Nothing is told of what lies elsewhere, not even whether it is there.
    """
    try:
        path = Path(given).resolve()
        roots = [Path(root).resolve() for root in (*config.lora_allowed_roots, config.lora_dir) if root is not None]
    except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links
        raise InvalidRequest("lora_path is not a path", param="lora_path") from None
    if not any(path.is_relative_to(root) for root in roots):
        message = "lora_path is outside of the folders that adapters may be loaded from (adapters.lora_allowed_roots)"
        raise RequestRefused(403, message, code="path_not_allowed", param="lora_path")
    return path


def operation(name: str) -> dict[str, Any]:
    """The operations of /openapi.json."""
    summaries = {"load": "Load a LoRA adapter", "unload": "Unload a LoRA adapter when nothing uses it any more"}
    model = LoadAdapterRequest if name == "load" else UnloadAdapterRequest
    found = json_operation(summaries[name], model, {}, tag="adapters")
    found["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    found["responses"] = {status: each for status, each in found["responses"].items() if status != "429"}
    reasons = "no admin key, or a folder that may not be loaded from" if name == "load" else "no admin key"
    found["responses"]["403"] = error_responses("400")["400"] | {"description": reasons}
    return found
