"""What each key may do, and what it does now: models, rates, requests at once, sizes. Others than `[[keys]]` have no limits.

HTTP request ─► enter      requests_per_minute, max_concurrent     429
engine       ─► check      models, adapters                        404, as if the model were not there
request      ─► fit        max_tokens, max_context                 400
             ─► reserve    tokens_per_minute                       429; the prompt and max_tokens are taken,
stream ends  ─► settle     what was not generated is given back
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING

from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.queue import Share
from llmd.errors import InvalidParams, InvalidRequest, ModelNotFound, Overloaded
from llmd.server.buckets import TokenBucket

if TYPE_CHECKING:
    from llmd.config import KeyConfig
    from llmd.text.stream import RequestStream

current_key: ContextVar[str] = ContextVar("llmd_key", default="")  # of the request that is being handled
Params = SamplingParams | PoolingParams
_BUSY_S = 1.0  # when to ask again while as many requests run as may: nobody can know how long they take


class _Account:
    """One key: its limits and what it has used of them."""

    __slots__ = ("config", "num_running", "requests", "tokens")

    def __init__(self, config: KeyConfig, clock_ns: Callable[[], int]) -> None:
        self.config = config
        self.num_running = 0
        self.requests: TokenBucket | None = None
        self.tokens: TokenBucket | None = None
        self.set_limits(config, clock_ns)

    def set_limits(self, config: KeyConfig, clock_ns: Callable[[], int]) -> None:
        """Take new limits; what was used stays used."""
        self.config = config
        self.requests = _bucket(self.requests, config.requests_per_minute, clock_ns)
        self.tokens = _bucket(self.tokens, config.tokens_per_minute, clock_ns)


def _bucket(bucket: TokenBucket | None, rate: int | None, clock_ns: Callable[[], int]) -> TokenBucket | None:
    if rate is None or bucket is None:
        return None if rate is None else TokenBucket(rate, clock_ns)
    if rate != bucket.per_minute:
        bucket.set_rate(rate)
    return bucket


class Quotas:
    """The accounts of all keys. Loop thread only."""

    def __init__(self, keys: Iterable[KeyConfig] = (), clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._accounts: dict[str, _Account] = {}
        self.configure(keys)

    def configure(self, keys: Iterable[KeyConfig]) -> None:
        """Take these keys' limits from now on; a key that stays keeps what it has used."""
        accounts: dict[str, _Account] = {}
        for config in keys:
            account = self._accounts.get(config.name)
            if account is None:
                account = _Account(config, self._clock_ns)
            else:
                account.set_limits(config, self._clock_ns)
            accounts[config.name] = account
        self._accounts = accounts

    def shares(self) -> dict[str, Share]:
        """Weights and priorities for fair scheduling, by key."""
        return {name: Share(account.config.weight, account.config.priority) for name, account in self._accounts.items()}

    # --- one HTTP request

    @contextmanager
    def enter(self, key: str) -> Iterator[dict[str, str]]:
        """Count a request while it is served; headers that tell what is left. Raises Overloaded (429)."""
        account = self._accounts.get(key)
        if account is None:
            yield {}
            return
        self._take_request(account)
        account.num_running += 1
        try:
            yield _headers(account)
        finally:
            account.num_running -= 1

    def _take_request(self, account: _Account) -> None:
        config, bucket = account.config, account.requests
        if config.max_concurrent is not None and account.num_running >= config.max_concurrent:
            raise Overloaded(f"key {config.name!r} has {account.num_running} requests running, as many as it may", _BUSY_S)
        if bucket is None:
            return
        if wait_s := bucket.wait_s(1):
            raise Overloaded(f"key {config.name!r} may send {bucket.per_minute} requests a minute", wait_s)
        bucket.take(1)

    # --- one request to the engine

    def allows(self, key: str, names: Sequence[str], adapter: str | None = None) -> bool:
        """Whether a key may use a model (by any of its names) and an adapter of it."""
        account = self._accounts.get(key)
        if account is None:
            return True
        config = account.config
        is_listed = not config.models or any(name in config.models for name in names)
        return is_listed and (adapter is None or not config.adapters or adapter in config.adapters)

    def check(self, key: str, names: Sequence[str], adapter: str | None = None) -> None:
        """Raise ModelNotFound where the key may not use the model: it learns no more of it than that."""
        if not self.allows(key, names, adapter):
            name = names[0] if adapter is None else adapter
            raise ModelNotFound(f"model {name!r} is not served to this key", param="model", code="model_not_found")

    def fit(self, key: str, params: SamplingParams, num_prompt_tokens: int, *, is_asked: bool = True) -> SamplingParams:
        """The params within the key's sizes; max_tokens that the client did not ask for is lowered, other is refused."""
        account = self._accounts.get(key)
        if account is None:
            return params
        config, wanted = account.config, params.max_tokens
        bounds = [config.max_tokens] if config.max_tokens is not None else []
        if config.max_context is not None:
            _check_context(config.max_context, num_prompt_tokens + 1)
            bounds.append(config.max_context - num_prompt_tokens)
        if not bounds or (wanted is not None and wanted <= min(bounds)):
            return params
        if wanted is not None and is_asked:
            raise InvalidParams("max_tokens", wanted, f"at most {min(bounds)} with this key and prompt")
        return replace(params, max_tokens=min(bounds), min_tokens=min(params.min_tokens, *bounds))

    def fit_prompt(self, key: str, num_tokens: int) -> None:
        """Raise InvalidRequest for a text that is longer than the key may send."""
        account = self._accounts.get(key)
        if account is not None and account.config.max_context is not None:
            _check_context(account.config.max_context, num_tokens)

    def check_tokens(self, key: str, params: Params, num_prompt_tokens: int) -> None:
        """Raise Overloaded (429) until the minute has room for the prompt and all output tokens that may come.

        A request larger than a whole minute goes when nothing else was used, and leaves a debt.
        """
        account, amount = self._accounts.get(key), _num_tokens(params, num_prompt_tokens)
        if account is None or account.tokens is None:
            return
        if wait_s := account.tokens.wait_s(amount):
            limit = f"key {account.config.name!r} may use {account.tokens.per_minute} tokens a minute"
            raise Overloaded(f"{limit}, this request up to {amount}", wait_s)

    def reserve(self, key: str, params: Params, num_prompt_tokens: int) -> Callable[[RequestStream], None] | None:
        """Take the tokens of a request that was queued; what is returned is called when its stream is closed."""
        account = self._accounts.get(key)
        if account is None or account.tokens is None:
            return None
        taken = min(_num_tokens(params, num_prompt_tokens), account.tokens.per_minute)
        account.tokens.take(taken)

        def settle(stream: RequestStream) -> None:
            """Give back what was not generated, or take what was not reserved."""
            unused = taken - num_prompt_tokens - stream.num_output_tokens
            if account.tokens is None:
                return  # the limit was lifted meanwhile
            if unused < 0:
                account.tokens.take(-unused)
            else:
                account.tokens.give_back(unused)

        return settle


def _num_tokens(params: Params, num_prompt_tokens: int) -> int:
    """The most that a request can use."""
    return num_prompt_tokens + (params.n * (params.max_tokens or 0) if isinstance(params, SamplingParams) else 0)


def _check_context(limit: int, num_tokens: int) -> None:
    if num_tokens > limit:
        raise InvalidRequest(
            f"the prompt and its answer take at least {num_tokens} tokens and this key may use {limit} a sequence",
            param="prompt",
            code="context_length_exceeded",
        )


def _headers(account: _Account) -> dict[str, str]:
    """What is left, under the names that OpenAI's clients know."""
    found = {}
    for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
        if bucket is not None:
            found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
            found[f"x-ratelimit-remaining-{name}"] = str(max(0, bucket.available))
            found[f"x-ratelimit-reset-{name}"] = f"{bucket.wait_s(bucket.per_minute):.3f}s"
    return found
