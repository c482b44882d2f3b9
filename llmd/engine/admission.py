"""Who may wait: whether a request can be served at all, and whether the queue has room for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.config import SchedulerConfig
from llmd.engine.executor import ExecutorInfo
from llmd.engine.params import SamplingParams
from llmd.engine.queue import FairQueue, Load, WaitingQueue
from llmd.engine.request import Request
from llmd.errors import InvalidRequest, Overloaded

if TYPE_CHECKING:
    from llmd.engine.scheduler import Scheduler

_KEY_SHARE = 4  # times what is free in the queue: a key alone may fill four fifths of it


def check_room(
    config: SchedulerConfig,
    waiting: WaitingQueue,
    num_waiting_tokens: int,
    prefill_rate: float,
    *,
    num_tokens: int,
    num_requests: int,
    key: str,
) -> None:
    """Raise Overloaded when so much more could not wait. `prefill_rate`: tokens a second, for an honest Retry-After.

    A key may fill the queue only as far as room for others stays: with `_KEY_SHARE` times what is still free.
    """
    num_waiting, ahead = len(waiting), num_waiting_tokens
    if num_waiting + num_requests > config.max_waiting_requests and num_waiting:
        limit = f"{num_waiting} requests are waiting (limit {config.max_waiting_requests})"
    elif num_waiting_tokens + num_tokens > config.max_waiting_tokens and num_waiting:
        limit = f"{num_waiting_tokens} prompt tokens are waiting (limit {config.max_waiting_tokens})"
    elif key and isinstance(waiting, FairQueue):
        own = waiting.load(key)
        free = Load(config.max_waiting_requests - num_waiting, config.max_waiting_tokens - num_waiting_tokens)
        if (what := _beyond_share(own, free, num_tokens, num_requests)) is None:
            return
        limit, ahead = f"{what} of key {key!r} are waiting, the rest of the queue is for others", own.num_tokens
    else:
        return
    raise Overloaded(limit, min(max(ahead / max(prefill_rate, 1.0), 1.0), 60.0))


def _beyond_share(own: Load, free: Load, num_tokens: int, num_requests: int) -> str | None:
    """What a key has too much of to add more; a key that has nothing waiting always has room."""
    if own.num_sequences and own.num_sequences + num_requests > _KEY_SHARE * free.num_sequences:
        return f"{own.num_sequences} requests"
    if own.num_sequences and own.num_tokens + num_tokens > _KEY_SHARE * free.num_tokens:
        return f"{own.num_tokens} prompt tokens"
    return None


def check_request(request: Request, info: ExecutorInfo, config: SchedulerConfig, scheduler: Scheduler) -> None:
    """Raise InvalidRequest for what this model cannot serve, whatever else runs."""
    _check_length(len(request.prompt), info, config, generates=isinstance(request.params, SamplingParams))
    if isinstance(request.params, SamplingParams):
        if not info.can_generate:
            raise InvalidRequest("this model gives embeddings, it generates no text", param="model")
    elif not info.can_pool:
        raise InvalidRequest("this model gives no embeddings", param="model")
    if min(request.prompt.token_ids) < 0 or max(request.prompt.token_ids) >= info.vocab_size:
        raise InvalidRequest(f"token ids must be between 0 and {info.vocab_size - 1}", param="prompt")
    if request.request_id in scheduler.requests:
        raise InvalidRequest(f"request id {request.request_id!r} is already running", param="request_id")


def _check_length(length: int, info: ExecutorInfo, config: SchedulerConfig, *, generates: bool) -> None:
    if length == 0:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if length > (info.max_model_len - 1 if generates else info.max_model_len):
        raise InvalidRequest(
            f"the prompt has {length} tokens and the context holds {info.max_model_len}, at least one of them generated",
            param="prompt",
            code="context_length_exceeded",
        )
    if not config.enable_chunked_prefill and length > config.max_num_batched_tokens:
        raise InvalidRequest(
            f"the prompt has {length} tokens and a step takes {config.max_num_batched_tokens}, "
            "with enable_chunked_prefill off",
            param="prompt",
        )
