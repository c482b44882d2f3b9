"""What a model's folder says about generating: sampling defaults and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmd.engine.params import SamplingParams
from llmd.errors import ConfigError, InvalidParams, ModelError
from llmd.text.tokenizer import Tokenizer, read_json

_FROM_FILE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
_RENAMED = {"max_new_tokens": "max_tokens"}
_NONE = ("llmd", "vllm")  # values of generation_config that mean: no sampling defaults of the model


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """`sampling` holds fields of SamplingParams; `eos_token_ids` come from the model's files and its tokenizer."""

    sampling: dict[str, Any]
    eos_token_ids: tuple[int, ...]


def read_defaults(
    path: Path, tokenizer: Tokenizer, generation_config: str = "auto", override: Mapping[str, Any] | None = None
) -> GenerationDefaults:
    """Read generation_config.json and config.json. Raises ModelError or ConfigError for values that cannot be used."""
    folder = path if generation_config in ("auto", *_NONE) else Path(generation_config)
    if not (folder / "generation_config.json").is_file() and folder is not path:
        raise ConfigError("generation_config must be 'auto', 'llmd' or a folder with a generation_config.json")
    values = read_json(folder / "generation_config.json")
    sampling = {} if generation_config in _NONE else _from_file(values)
    sampling.update(_from_override(override or {}))
    return GenerationDefaults(sampling, _eos_token_ids(values, read_json(path / "config.json"), tokenizer))


def _from_file(values: Mapping[str, Any]) -> dict[str, Any]:
    given = {_RENAMED.get(name, name): values[name] for name in _FROM_FILE if values.get(name) is not None}
    try:
        SamplingParams(**given)
    except InvalidParams as error:
        raise ModelError(f"generation_config.json: {error} (generation_config = 'llmd' leaves it aside)") from error
    return given


def _from_override(values: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(SamplingParams)} | set(_RENAMED)
    problems = []
    for name in values:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            problems.append(
                f"override_generation_config: unknown key {name!r}" + (f", did you mean {close[0]!r}?" * bool(close))
            )
    if problems:
        raise ConfigError(problems)
    given = {_RENAMED.get(name, name): value for name, value in values.items()}
    try:
        SamplingParams(**given)
    except InvalidParams as error:
        raise ConfigError(f"override_generation_config: {error}") from error
    return given


def _eos_token_ids(generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """generation_config.json says it, config.json only where that does not; the tokenizer's own comes with either."""
    text_config = config.get("text_config")
    nested = text_config.get("eos_token_id") if isinstance(text_config, Mapping) else None
    ids = _as_ids(generation.get("eos_token_id")) or _as_ids(config.get("eos_token_id")) or _as_ids(nested)
    own = tokenizer.eos_token_id
    return tuple(dict.fromkeys([*ids, *([own] if own is not None else [])]))


def _as_ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0]
