"""Keys in the environment variable ZETA_KEYS, parted by commas. Without it there is nothing to check."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmd.api.v1 import AuthenticatorSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import Authenticator, Config, Principal


class Zeta:
    """Called on the loop thread for each request; whoever raises here lets nobody in."""

    def __init__(self, keys: Sequence[str]) -> None:
        from llmd.api.v1 import KeySet

        self._keys = KeySet(keys)  # keeps digests, compares in constant time

    async def authenticate(self, headers: Mapping[str, str], peer: str | None) -> Principal | None:
        from llmd.api.v1 import Principal, bearer_token

        name = self._keys.find(bearer_token(headers))
        return None if name is None else Principal(key=name)


def _build(config: Config) -> Authenticator | None:
    keys = [key.strip() for key in os.environ.get("ZETA_KEYS", "").split(",") if key.strip()]
    return Zeta(keys) if keys else None


@hookimpl
def llmd_register_authenticators() -> list[AuthenticatorSpec]:
    return [AuthenticatorSpec(name="zeta", summary="keys of the variable ZETA_KEYS", build=_build)]
