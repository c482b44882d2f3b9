"""Bounds of a request's params that only the loaded model knows."""

from __future__ import annotations

from collections.abc import Iterable

from llmd.engine.params import SamplingParams
from llmd.errors import InvalidParams


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Every token id in `params` must be one of the model's; raises InvalidParams that names the field and the id."""
    fields: tuple[tuple[str, Iterable[int] | None], ...] = (
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids),
        ("stop_token_ids", params.stop_token_ids),
    )
    for name, token_ids in fields:
        if token_ids and (highest := max(token_ids)) >= vocab_size:
            raise InvalidParams(name, highest, f"token ids between 0 and {vocab_size - 1}")
