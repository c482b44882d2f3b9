"""Log-probabilities of an answer's tokens, as the parts of a message and the events of its text have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmd.api.v1 import ModelService, TokenLogprobs

_LOWEST = -9999.0  # JSON has no minus infinity


class LogprobFormat:
    """Turns TokenLogprobs into what clients read; `num_top` alternatives besides the chosen token."""

    def __init__(self, service: ModelService, num_top: int) -> None:
        self._service, self._num_top = service, num_top

    def entries(self, tokens: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """One entry a token."""
        return [self._entry(token) for token in tokens]

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        pairs = list(zip(entry.top_ids, entry.top_logprobs, strict=True))[: self._num_top]
        top = [self._token(token_id, logprob) for token_id, logprob in pairs]
        return {**self._token(entry.token_id, entry.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._service.logprob_token(token_id)
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(raw)}
