"""What differs between two configurations, and what a running daemon can take over of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

from pydantic import BaseModel

from llmd.config import Config, KeyConfig, Path, dotted
from llmd.config_keys import find_field

_MAX_SHOWN = 60

# Keys that are applied while requests run: `*` stands for any place in a list, and a table for all that is in it.
# (models, *, …) is what a loaded model can change, ("cache", "isolate_keys") what later requests are hashed with.
LIVE_KEYS: tuple[Path, ...] = (
    ("keys",),
    ("limits",),
    ("log", "level"),
    ("log", "access"),
    ("cache", "isolate_keys"),
    ("scheduler", "max_waiting_requests"),
    ("scheduler", "max_waiting_tokens"),
    ("adapters", "lora_modules"),
    ("adapters", "lora_dir"),
    ("adapters", "lora_allowed_roots"),
    ("models", "*", "generation_config"),
    ("models", "*", "override_generation_config"),
    ("server", "api_keys"),
    ("server", "api_key_file"),
    ("server", "admin_keys"),
    ("server", "open_routes"),
    ("server", "cors_allowed_origins"),
    ("server", "cors_allowed_methods"),
    ("server", "cors_allowed_headers"),
    ("server", "request_timeout_s"),
    ("server", "drain_timeout_s"),
)
# Keys that are applied when no request runs any more: they say how sequences wait and what of them is kept.
IDLE_KEYS: tuple[Path, ...] = (("scheduler", "policy"), ("scheduler", "priority_aging_s"), ("scheduler", "watermark"))


class Outcome(Enum):
    """What becomes of a change."""

    APPLIED = "applied"
    DRAIN = "needs a drain"  # it waits until nothing runs
    RESTART = "needs a restart"
    REFUSED = "refused"


class Change(NamedTuple):
    """One key whose value differs; `old` and `new` are empty where they may be secrets."""

    path: Path
    outcome: Outcome
    old: str = ""
    new: str = ""

    @property
    def text(self) -> str:
        """One line for the operator."""
        values = f" ({self.old} → {self.new})" if self.old or self.new else ""
        return f"{dotted(self.path)}: {self.outcome.value}{values}"


class Rules:
    """Which changes are applied when; `live_settings` are a plugin section's fields that its plugin takes over."""

    def __init__(self, live_settings: Mapping[str, frozenset[str]] | None = None) -> None:
        self._live_settings = live_settings or {}

    def outcome(self, path: Path) -> Outcome:
        """What becomes of a change of this key."""
        if path[0] == "plugins" and len(path) > 2:
            is_live = path[2] in self._live_settings.get(str(path[1]), ())
            return Outcome.APPLIED if is_live else Outcome.RESTART
        if _is_among(path, LIVE_KEYS):
            return Outcome.APPLIED
        return Outcome.DRAIN if _is_among(path, IDLE_KEYS) else Outcome.RESTART


def _is_among(path: Path, patterns: tuple[Path, ...]) -> bool:
    return any(
        len(pattern) <= len(path) and all(part in ("*", given) for part, given in zip(pattern, path, strict=False))
        for pattern in patterns
    )


def changes(old: Config, new: Config, rules: Rules | None = None) -> list[Change]:
    """Every key that differs between two configurations, in their order."""
    rules = rules or Rules()
    return [
        Change(path, rules.outcome(path), *_shown(path, before, after)) for path, before, after in _differences(old, new, ())
    ]


def merge(old: Config, new: Config, *outcomes: Outcome, rules: Rules | None = None) -> Config:
    """The old configuration with those changes of the new one that have one of these outcomes."""
    merged: Config = _merged(old, new, (), rules or Rules(), outcomes)
    merged._places = new._places
    return merged


def _differences(old: Any, new: Any, path: Path) -> Iterator[tuple[Path, Any, Any]]:
    if isinstance(old, BaseModel) and isinstance(new, BaseModel):
        for name in type(old).model_fields:
            yield from _differences(getattr(old, name), getattr(new, name), (*path, name))
        yield from _differences(old.model_extra or {}, new.model_extra or {}, path)
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in {**old, **new}:
            before, after = old.get(name), new.get(name)
            if len(path) == 1 and isinstance(before or after, Mapping):  # a plugin's table that one of them lacks
                before, after = before or {}, after or {}
            yield from _differences(before, after, (*path, name))
    elif _are_tables(old, KeyConfig) or _are_tables(new, KeyConfig):
        yield from _differences(_by_name(old), _by_name(new), path)
    elif _are_tables(old, BaseModel) and _are_tables(new, BaseModel) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, (*path, index))
    elif old != new:
        yield path, old, new


def _are_tables(value: Any, kind: type[BaseModel]) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(item, kind) for item in value)


def _by_name(keys: tuple[KeyConfig, ...]) -> dict[str, KeyConfig]:
    return {key.name: key for key in keys}


def _merged(old: Any, new: Any, path: Path, rules: Rules, outcomes: tuple[Outcome, ...]) -> Any:
    if path and rules.outcome(path) in outcomes:
        return new
    if isinstance(old, BaseModel):
        fields = [*type(old).model_fields, *(old.model_extra or {}), *(new.model_extra or {})]
        found = {
            name: _merged(getattr(old, name, {}), getattr(new, name, {}), (*path, name), rules, outcomes) for name in fields
        }
        return old.model_copy(update={name: value for name, value in found.items() if value != getattr(old, name, {})})
    if isinstance(old, Mapping) and isinstance(new, Mapping) and len(path) == 2 and path[0] == "plugins":
        names = {**old, **new}
        found = {name: _merged(old.get(name), new.get(name), (*path, name), rules, outcomes) for name in names}
        return {name: value for name, value in found.items() if value is not None}
    if _are_tables(old, BaseModel) and _are_tables(new, BaseModel) and len(old) == len(new):
        return tuple(
            _merged(one, other, (*path, index), rules, outcomes)
            for index, (one, other) in enumerate(zip(old, new, strict=True))
        )
    return old


def _shown(path: Path, old: Any, new: Any) -> tuple[str, str]:
    """Both values in short; nothing where they may be secrets or are tables."""
    if path[0] == "keys":
        if isinstance(old, KeyConfig) or isinstance(new, KeyConfig):
            return ("there" if old is not None else "none", "there" if new is not None else "none")
        is_secret = path[-1] in ("key", "hash", "file")
    else:
        info = find_field(Config, path)
        is_secret = path[0] == "plugins" or info is None or not info.repr
    if is_secret or (isinstance(old, tuple | dict | BaseModel) and not _is_plain(old, new)):
        return "", ""
    return _short(old), _short(new)


def _is_plain(*values: Any) -> bool:
    """Whether they are lists of texts."""
    return all(isinstance(value, tuple) and all(isinstance(item, str) for item in value) for value in values)


def _short(value: Any) -> str:
    text = "none" if value is None else repr(list(value) if isinstance(value, tuple) else value)
    text = {"True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
