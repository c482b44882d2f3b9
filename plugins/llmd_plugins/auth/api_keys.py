"""API keys from the configuration and from a file, sent as `Authorization: Bearer KEY` or `x-api-key`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmd.api.v1 import AuthenticatorSpec, ConfigError, hookimpl


class ApiKeys:
    """Knows the keys as digests only."""

    def __init__(self, keys: list[str]) -> None:
        from llmd.api.v1 import KeySet

        self._keys = KeySet(keys)

    async def authenticate(self, headers: Mapping[str, str], peer: str | None) -> Any:
        """The principal of a known key."""
        from llmd.api.v1 import Principal, bearer_token

        name = self._keys.find(bearer_token(headers))
        return Principal(key=name) if name is not None else None


def read_keys(path: Path) -> list[str]:
    """One key a line; empty lines and those that begin with '#' are left out. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"server.api_key_file: {str(path)!r} cannot be read: {type(error).__name__}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"server.api_key_file: {str(path)!r} holds no key: every request would be refused")
    return keys


def _build(config: Any) -> ApiKeys | None:
    keys = [key for key in config.server.api_keys if key]
    if len(keys) != len(config.server.api_keys):
        raise ConfigError("server.api_keys: a key is empty; allowed: keys of at least one character")
    if config.server.api_key_file is not None:
        keys += read_keys(Path(config.server.api_key_file))
    return ApiKeys(keys) if keys else None


@hookimpl
def llmd_register_authenticators() -> list[AuthenticatorSpec]:
    """The keys of the configuration."""
    return [AuthenticatorSpec(name="api_keys", summary="API keys from the configuration or a file", build=_build)]
