"""From the keywords of LLM and AsyncLLM to a model's service, not yet started."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmd.config import Config, ModelConfig
from llmd.config_load import load_config
from llmd.daemon import build_service, load_catalog, resolve_model
from llmd.flags import settings_of
from llmd.flags_table import FLAGS
from llmd.offline.adapters import as_modules

if TYPE_CHECKING:
    from llmd.server.generate import ModelService

_ALIASES = {"kv_cache_bytes": "kv_cache_memory_bytes", "lora_configs": "lora_modules", "disable_log_stats": None}
_MAX_UNREAD_BYTES = 1 << 30  # the reader is the program itself: it may pause for longer than a client may


class Loaded(NamedTuple):
    """A model on its way into this process."""

    config: ModelConfig
    path: Path  # the folder of its files
    service: ModelService
    max_in_flight: int  # requests at once: enough to fill every step, few enough to queue cheaply


def make_config(caller: str, options: dict[str, Any]) -> Config:
    """Keywords as the configuration. Raises TypeError for unknown ones, ConfigError for wrong values."""
    given: dict[str, Any] = {}
    known = [*(name.replace("-", "_") for name in FLAGS), *_ALIASES]
    for name, value in options.items():
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{caller}() got an unexpected keyword {name!r}{hint}")
        target = _ALIASES.get(name, name)
        if target is not None:
            given[target] = str(value) if isinstance(value, Path) else value
    if "lora_modules" in given:
        given["lora_modules"] = as_modules(given["lora_modules"])
    config = load_config(settings=settings_of(given))
    server = config.server.model_copy(update={"max_stream_buffer_bytes": _MAX_UNREAD_BYTES})
    return config.model_copy(update={"server": server})


def load(config: Config) -> Loaded:
    """Fetch the files and build the service; blocks. Raises ConfigError and ModelError for what cannot be used."""
    catalog = load_catalog(config)
    model = config.models[0]
    path = resolve_model(config, catalog, model)
    service = build_service(config, catalog, model, path=path)
    return Loaded(model, path, service, 2 * config.scheduler.max_num_seqs + 16)


async def start(service: ModelService) -> None:
    """Load the weights, with a bar in the terminal."""
    from llmd.loading import Bar

    bar = Bar(service.names[0])
    try:
        await service.start(bar.show)
    finally:
        bar.close()


def hugging_face_tokenizer(loaded: Loaded) -> Any:
    """The model's tokenizer as transformers loads it."""
    from transformers import AutoTokenizer

    folder = loaded.config.tokenizer or str(loaded.path)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=loaded.config.trust_remote_code)
