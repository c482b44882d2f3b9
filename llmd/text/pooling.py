"""How a model's own files say that texts become vectors: sentence-transformers' modules, prompts and lengths.

modules.json                       Transformer → Pooling → Normalize; anything else is refused by name
1_Pooling/config.json              which hidden states are pooled
sentence_bert_config.json          max_seq_length, do_lower_case
config_sentence_transformers.json  prompts by name, the default one
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmd.errors import InvalidRequest, ModelError
from llmd.text.tokenizer import read_json

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}
_MODE_NAMES = {**{name: name for name in _MODES.values()}, "lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingDefaults:
    """What the files say; None where they say nothing."""

    pooling: str | None = None
    normalize: bool = True
    max_length: int | None = None  # tokens
    is_lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None  # a name of one

    def prompt(self, name: str | None) -> str:
        """What is put before a text. Raises InvalidRequest for a name that the model does not have."""
        if name is None:
            name = self.default_prompt
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(map(repr, sorted(self.prompts))) or "none"
            raise InvalidRequest(
                f"prompt_name must be one of the model's prompts ({known}), got {name!r}", param="prompt_name"
            )
        return self.prompts[name]


def read_pooling(folder: Path) -> PoolingDefaults:
    """Read a model's folder. Raises ModelError for modules and poolings that are not served."""
    modules = _read_modules(folder)
    sentence = read_json(folder / "sentence_bert_config.json")
    prompts = read_json(folder / "config_sentence_transformers.json")
    named = {name: text for name, text in (prompts.get("prompts") or {}).items() if isinstance(text, str)}
    default = prompts.get("default_prompt_name")
    if default is not None and default not in named:
        raise ModelError(f"{folder.name}/config_sentence_transformers.json: default_prompt_name {default!r} is no prompt")
    pooling = next((path for kind, path in modules if kind == "Pooling"), None)
    length = sentence.get("max_seq_length")
    return PoolingDefaults(
        pooling=None if pooling is None else _read_mode(folder, pooling, has_prompts=any(named.values())),
        normalize=not modules or any(kind == "Normalize" for kind, _ in modules),
        max_length=length if isinstance(length, int) and length > 0 else None,
        is_lower_case=sentence.get("do_lower_case") is True,
        prompts=named,
        default_prompt=default,
    )


def _read_modules(folder: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module, in order; none where the file is missing."""
    try:
        listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder.name}/modules.json cannot be read ({error}): download it again") from error
    if not isinstance(listed, list) or not all(isinstance(item, Mapping) for item in listed):
        raise ModelError(f"{folder.name}/modules.json must be a list of objects")
    modules = [(str(item.get("type", "")).rpartition(".")[2], str(item.get("path", ""))) for item in listed]
    for kind, path in modules:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ModelError(
                f"{folder.name}/modules.json: the module {kind!r} ({path or 'no path'}) is not served; "
                "served are Transformer, Pooling and Normalize"
            )
    return modules


def _read_mode(folder: Path, path: str, *, has_prompts: bool) -> str:
    where = f"{folder.name}/{path}/config.json"
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ModelError(f"{folder.name}/modules.json: path {path!r} must lie within the model's folder")
    config = read_json(folder / path / "config.json")
    if config.get("include_prompt", True) is False and has_prompts:
        raise ModelError(f"{where}: include_prompt must be true: vectors without the prompt's tokens are not served")
    modes = _modes(config)
    if len(modes) != 1 or modes[0] not in _MODE_NAMES:
        served = ", ".join(sorted(set(_MODE_NAMES.values())))
        raise ModelError(f"{where}: pooling must be one of {served}, got {' and '.join(modes) or 'none'}")
    return _MODE_NAMES[modes[0]]


def _modes(config: Mapping[str, Any]) -> list[str]:
    """One name for each mode that is switched on."""
    named = config.get("pooling_mode")
    if isinstance(named, str):
        return [named]
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    return [_MODES.get(key, key.removeprefix("pooling_mode_")) for key in on] or (["mean"] if not config else [])
