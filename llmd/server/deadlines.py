"""How long the request that is being handled may take: what the operator says, or less where its client does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

from llmd.errors import InvalidRequest

if TYPE_CHECKING:
    from llmd.config import Config

HEADER = "X-Request-Timeout"
MAX_TIMEOUT_S = 86400.0

_own: ContextVar[float | None] = ContextVar("llmd_request_timeout", default=None)  # each request has a context of its own


def limit_time(timeout_s: float | None) -> None:
    """The client of the request that is being handled waits no longer than this."""
    if timeout_s is not None:
        _own.set(timeout_s)


def read_timeout(headers: Mapping[str, str]) -> float | None:
    """The header's seconds; None: not given. Raises InvalidRequest."""
    text = headers.get(HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_S:
        allowed = f"a number of seconds above 0 and at most {MAX_TIMEOUT_S:g}"
        raise InvalidRequest(f"{HEADER} must be {allowed}, got {text[:80]!r}", param=HEADER)
    return seconds


def time_limit_s(config: Config) -> float | None:
    """Seconds that the request being handled may take; None: as long as it wants."""
    limits = [limit for limit in (config.server.request_timeout_s, _own.get()) if limit is not None]
    return min(limits, default=None)


def timeout_message(config: Config) -> str:
    """What the client of a request is told whose time is over."""
    limit = time_limit_s(config)
    return f"the request took longer than {limit} s" if limit is not None else "the request took longer than it should"
