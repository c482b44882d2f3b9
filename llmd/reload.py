"""Applying a changed configuration to a running daemon: what differs, what is applied live, what needs a restart."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from llmd.config import Config, Path, dotted
from llmd.errors import ConfigError

if TYPE_CHECKING:
    from llmd.plugin.specs import AuthenticatorSpec
    from llmd.server.auth import Authenticator, Principal

log = logging.getLogger(__name__)

LIVE_KEYS: frozenset[Path] = frozenset({("log", "level"), ("server", "api_keys"), ("server", "api_key_file")})


class Change(NamedTuple):
    """One key whose value differs."""

    path: Path
    is_live: bool

    @property
    def text(self) -> str:
        """One line for the operator; values are not told, they may be secrets."""
        return f"{dotted(self.path)}: {'applied' if self.is_live else 'needs a restart'}"


def changes(old: Config, new: Config) -> list[Change]:
    """Every key that differs between two configurations."""
    return [Change(path, path in LIVE_KEYS) for path in _differences(old, new, ())]


def _differences(old: Any, new: Any, path: Path) -> Iterator[Path]:
    if isinstance(old, BaseModel) and isinstance(new, BaseModel):
        for name in type(old).model_fields:
            yield from _differences(getattr(old, name), getattr(new, name), (*path, name))
        yield from _differences(old.model_extra or {}, new.model_extra or {}, path)
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in {**old, **new}:
            yield from _differences(old.get(name), new.get(name), (*path, name))
    elif _are_tables(old) and _are_tables(new) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, (*path, index))
    elif old != new:
        yield path


def _are_tables(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(item, BaseModel) for item in value)


def merge_live(old: Config, new: Config) -> Config:
    """The running configuration with the live keys of the new one."""
    tables: dict[str, Any] = {}
    for table, key in sorted(LIVE_KEYS):
        section = tables.get(str(table), getattr(old, str(table)))
        value = getattr(getattr(new, str(table)), str(key))
        tables[str(table)] = section.model_copy(update={str(key): value})
    return old.model_copy(update=tables)


class LiveAuthenticators:
    """All authenticators as one whose keys can be exchanged while requests run. Fails closed: who raises lets nobody in."""

    def __init__(self, specs: list[AuthenticatorSpec], config: Config) -> None:
        self._specs = sorted(specs, key=lambda spec: spec.order)
        self._built: list[Authenticator] = []
        self.rebuild(config)

    def rebuild(self, config: Config) -> None:
        """Build every authenticator for this configuration; if one raises, the old ones stay.

        Raises ConfigError when nothing would be asked for any more: a door that was shut opens only with a restart.
        """
        built = [authenticator for spec in self._specs if (authenticator := spec.build(config)) is not None]
        if self._built and not built:
            raise ConfigError("server.api_keys: the last key cannot be taken away while serving, that needs a restart")
        self._built = built

    async def authenticate(self, headers: Mapping[str, str], peer: str | None) -> Principal | None:
        """The first principal found; with nothing to check everyone is anonymous."""
        from llmd.server.auth import ANONYMOUS

        for authenticator in self._built:
            if (principal := await authenticator.authenticate(headers, peer)) is not None:
                return principal
        return None if self._built else ANONYMOUS
