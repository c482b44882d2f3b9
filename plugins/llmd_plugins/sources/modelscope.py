"""ModelScope, instead of the Hugging Face hub where LLMD_USE_MODELSCOPE (or vLLM's VLLM_USE_MODELSCOPE) is set."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

from llmd.api.v1 import ModelError, ModelSourceSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import LoadProgress, ModelConfig

_VARIABLES = ("LLMD_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


def is_wanted() -> bool:
    """Whether the environment asks for ModelScope."""
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in _VARIABLES)


def why_not(config: ModelConfig) -> str | None:
    """What keeps ModelScope from being asked; None if nothing does."""
    if util.find_spec("modelscope") is None:
        return "LLMD_USE_MODELSCOPE is set and the package modelscope is not installed: pip install 'llmd[modelscope]'"
    return None


def resolve(config: ModelConfig, report: Callable[[LoadProgress], None]) -> Path:
    """Download what is not cached yet. Raises ModelError with the name of the model and what ModelScope said."""
    if reason := why_not(config):
        raise ModelError(reason)
    from modelscope.hub.snapshot_download import snapshot_download

    from llmd.api.v1 import LoadProgress

    report(LoadProgress(f"downloading {config.model} from ModelScope", 0.0))
    try:
        folder = snapshot_download(
            config.model, revision=config.revision, cache_dir=config.download_dir, allow_patterns=_PATTERNS
        )
    except Exception as error:  # the package raises a dozen unrelated kinds; its words are what helps
        raise ModelError(f"model {config.model!r} cannot be fetched from ModelScope: {error}") from error
    report(LoadProgress(f"downloaded {config.model}", 1.0))
    return Path(folder)


@hookimpl
def llmd_register_model_sources() -> list[ModelSourceSpec]:
    """ModelScope, if the environment asks for it."""
    return [
        ModelSourceSpec(
            name="modelscope",
            summary="ModelScope, with LLMD_USE_MODELSCOPE=1",
            claims=lambda config: is_wanted(),
            resolve=resolve,
            check=why_not,
            order=50,
        )
    ]
