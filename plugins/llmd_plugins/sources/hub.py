"""The Hugging Face hub: what is not in its cache yet is downloaded, weights as safetensors only."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import ModelError, ModelSourceSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import LoadProgress, ModelConfig

log = logging.getLogger(__name__)

_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_WITHOUT_WEIGHTS = [pattern for pattern in _PATTERNS if pattern != "*.safetensors"]
# weights in other layouts that some repositories keep beside the ones that are served; folders that begin with a number
# are modules of sentence-transformers (2_Dense)
_IGNORED = ["original/*", "onnx/*", "*.bin.index.json", "*consolidated*", "[!0-9]*/*.safetensors"]


def _bars_for(report: Callable[[LoadProgress], None], name: str) -> type:
    """A tqdm class for snapshot_download that draws nothing and tells `report` the bytes that came."""
    from tqdm.auto import tqdm

    from llmd.api.v1 import LoadProgress

    class Bar(tqdm):  # type: ignore[misc]
        """Adds up the bytes of all files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._counts_bytes = kwargs.get("unit") == "B"
            kwargs["disable"] = False
            kwargs["file"] = _Nowhere()
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            """Count, and tell."""
            shown = super().update(n)
            if self._counts_bytes and self.total:
                done = min(1.0, self.n / self.total)
                report(LoadProgress(f"downloading {name}: {self.n / 1e6:.0f} of {self.total / 1e6:.0f} MB", done))
            return shown

    return Bar


class _Nowhere:
    """A stream that takes what a bar draws."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Take it."""
        return len(text)

    def flush(self) -> None:
        """Nothing is kept."""


def resolve(config: ModelConfig, report: Callable[[LoadProgress], None]) -> Path:
    """The snapshot's folder. Raises ModelError that says whether name, token, revision or network is at fault."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = _WITHOUT_WEIGHTS if config.load_format == "dummy" else _PATTERNS
    try:
        folder = snapshot_download(
            config.model,
            revision=config.revision,
            cache_dir=config.download_dir,
            token=config.hf_token,
            allow_patterns=patterns,
            ignore_patterns=_IGNORED,
            tqdm_class=_bars_for(report, config.model),
            library_name="llmd",
        )
    except (OSError, HFValidationError, ValueError) as error:
        raise ModelError(_explain(config, error)) from error
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"model {config.model!r} at the hub holds no config.json, so it is not a model that can be served")
    return Path(folder)


def _explain(config: ModelConfig, error: Exception) -> str:
    from huggingface_hub import constants, errors

    name = f"model {config.model!r}"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: ask for access on its page at the hub, then set models.hf_token (or HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {config.revision!r} at the hub"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name} is neither a local folder nor known at the hub; if it is private, set models.hf_token (or HF_TOKEN)"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return f"{name} is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it"
        return f"{name} is not in the hub's cache, and the hub cannot be reached: {_cause(error)}"
    return f"{name} cannot be fetched from the hub: {_cause(error)}"


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


@hookimpl
def llmd_register_model_sources() -> list[ModelSourceSpec]:
    """The hub, for names that look like one of its own."""
    return [
        ModelSourceSpec(
            name="hub",
            summary="the Hugging Face hub",
            claims=lambda config: bool(_NAME.fullmatch(config.model)),
            resolve=resolve,
            order=100,
        )
    ]
