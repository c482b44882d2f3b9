"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: adapters come and go while the daemon serves. For admin keys."""

from __future__ import annotations

from typing import Any

from llmd.api.v1 import RouteSpec, hookimpl


def _load(context: Any) -> Any:
    from llmd_plugins.adapters.loading import load

    return load(context)


def _unload(context: Any) -> Any:
    from llmd_plugins.adapters.loading import unload

    return unload(context)


def _operation(name: str) -> Any:
    def build() -> Any:
        from llmd_plugins.adapters import loading

        return loading.operation(name)

    return build


@hookimpl
def llmd_register_routes() -> list[RouteSpec]:
    """The routes, with vLLM's paths and fields."""
    return [
        RouteSpec(
            name="adapters.load", summary="load a LoRA adapter from its folder", method="POST",
            path="/v1/load_lora_adapter", build=_load, admin=True, openapi=_operation("load"),
        ),
        RouteSpec(
            name="adapters.unload", summary="unload a LoRA adapter", method="POST",
            path="/v1/unload_lora_adapter", build=_unload, admin=True, openapi=_operation("unload"),
        ),
    ]  # fmt: skip
