"""`demo`: the small model that comes with llmd, so that the first minute needs no download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from llmd.api.v1 import ModelError, ModelSourceSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import LoadProgress, ModelConfig


def folder() -> Path:
    """Where the embedded model lies; raises ModelError if this installation lacks it."""
    path = Path(str(resources.files("llmd_plugins.sources.demo").joinpath("model")))
    if not (path / "config.json").is_file():
        raise ModelError("the embedded demo model is missing from this installation; reinstall llmd")
    return path


def _check(config: ModelConfig) -> str | None:
    try:
        folder()
    except ModelError as error:
        return str(error)
    return None


def _resolve(config: ModelConfig, report: Callable[[LoadProgress], None]) -> Path:
    return folder()


def _adapters(config: ModelConfig) -> Mapping[str, str]:
    """The demo model's own adapters by their names."""
    path = Path(str(resources.files("llmd_plugins.sources.demo").joinpath("adapters")))
    return {each.name: str(each) for each in sorted(path.glob("*")) if (each / "adapter_config.json").is_file()}


@hookimpl
def llmd_register_model_sources() -> list[ModelSourceSpec]:
    """The embedded model, with two adapters."""
    return [
        ModelSourceSpec(
            name="demo",
            summary="the embedded demo model",
            claims=lambda config: config.model == "demo",
            resolve=_resolve,
            check=_check,
            adapters=_adapters,
            order=0,
        )
    ]
