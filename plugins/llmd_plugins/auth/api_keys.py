"""API keys from the configuration and from files, sent as `Authorization: Bearer KEY` or `x-api-key`."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmd.api.v1 import AuthenticatorSpec, CommandSpec, ConfigError, hookimpl, secret_path

log = logging.getLogger("llmd.auth")


class ApiKeys:
    """Knows the keys as digests only; `named` are digests of `[[keys]]` and their names."""

    def __init__(self, keys: list[str], named: Mapping[bytes, str]) -> None:
        from llmd.api.v1 import KeySet

        self._keys = KeySet(keys, named)

    async def authenticate(self, headers: Mapping[str, str], peer: str | None) -> Any:
        """The principal of a known key."""
        from llmd.api.v1 import Principal, bearer_token

        name = self._keys.find(bearer_token(headers))
        return Principal(key=name) if name is not None else None


def read_keys(path: Path, name: str = "server.api_key_file") -> list[str]:
    """One key a line; empty lines and those that begin with '#' are left out. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: {str(path)!r} cannot be read: {type(error).__name__}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"{name}: {str(path)!r} holds no key: every request would be refused")
    return keys


def _digest_of(config: Any, index: int) -> bytes:
    """The digest of a `[[keys]]` table, from its hash, its key or its file. Raises ConfigError."""
    from llmd.api.v1 import key_digest

    given = config.keys[index]
    if given.hash is not None:
        return bytes.fromhex(given.hash.removeprefix("sha256:"))
    if given.key is not None:
        return key_digest(given.key)
    found = read_keys(secret_path(given.file), f"keys[{index}].file")
    if len(found) > 1:
        raise ConfigError(config.problem(("keys", index, "file"), f"{given.file!r} holds {len(found)} keys; allowed: one"))
    return key_digest(found[0])


def _named(config: Any) -> dict[bytes, str]:
    """Digest → name of every `[[keys]]` table. Raises ConfigError where two have the same key."""
    found: dict[bytes, str] = {}
    for index, given in enumerate(config.keys):
        digest = _digest_of(config, index)
        if digest in found:
            raise ConfigError(config.problem(("keys", index, "name"), f"{given.name!r} has the key of {found[digest]!r}"))
        found[digest] = given.name
    return found


def _exposed(config: Any) -> Iterator[str]:
    """The places where a key stands in the clear in a file that more than its owner may read."""
    paths: list[tuple[str | int, ...]] = [
        ("keys", index, "key") for index, given in enumerate(config.keys) if given.key is not None
    ]
    paths += [("server", name) for name in ("api_keys", "admin_keys") if getattr(config.server, name)]
    for path in paths:
        place = config.place(path)
        file, _, line = place.rpartition(":")
        try:
            if line.isdecimal() and stat.S_IMODE(os.stat(file).st_mode) & 0o077:
                yield place
        except OSError:
            continue  # it has been read, and is gone


def _build(config: Any) -> ApiKeys | None:
    keys = [key for key in config.server.api_keys if key]
    if len(keys) != len(config.server.api_keys):
        raise ConfigError("server.api_keys: a key is empty; allowed: keys of at least one character")
    if config.server.api_key_file is not None:
        keys += read_keys(secret_path(config.server.api_key_file))
    named = _named(config)
    for place in _exposed(config):
        log.warning("%s: a key in the clear that others may read: chmod 600, or give its hash or a file", place)
    return ApiKeys(keys, named) if keys or named else None


def _command() -> Any:
    from llmd_plugins.auth.key_command import key_group

    return key_group


@hookimpl
def llmd_register_authenticators() -> list[AuthenticatorSpec]:
    """The keys of the configuration."""
    return [AuthenticatorSpec(name="api_keys", summary="API keys from the configuration or a file", build=_build)]


@hookimpl
def llmd_register_commands() -> list[CommandSpec]:
    """`llmd key new NAME`."""
    return [CommandSpec(name="key", summary="Make API keys for [[keys]].", build=_command)]
