"""Log-probabilities in the formats of completions, chat completions and prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmd.api.v1 import ModelService, TokenLogprobs

_LOWEST = -9999.0  # JSON has no minus infinity


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST


class LogprobFormat:
    """Turns TokenLogprobs into what clients read; `num_top` alternatives besides the chosen token."""

    def __init__(self, service: ModelService, num_top: int, *, as_token_ids: bool = False) -> None:
        self._service, self._num_top, self._as_token_ids = service, num_top, as_token_ids

    def _token(self, token_id: int) -> tuple[str, bytes]:
        text, raw = self._service.logprob_token(token_id)
        return (f"token_id:{token_id}", raw) if self._as_token_ids else (text, raw)

    def _top(self, entry: TokenLogprobs) -> list[tuple[int, float]]:
        pairs = zip(entry.top_ids, entry.top_logprobs, strict=True)
        return [(token_id, _finite(logprob)) for token_id, logprob in pairs][: self._num_top]

    # --- chat completions

    def chat(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """`logprobs` of a chat choice."""
        return {"content": [self._chat_entry(entry) for entry in entries], "refusal": None}

    def _chat_entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._chat_token(token_id, logprob) for token_id, logprob in self._top(entry)]
        return {**self._chat_token(entry.token_id, _finite(entry.logprob)), "top_logprobs": top}

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._token(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    # --- completions

    def completion(self, entries: Sequence[TokenLogprobs], offsets: Sequence[int]) -> dict[str, Any]:
        """`logprobs` of a completions choice; `offsets` say where in the text each token begins."""
        return {
            "text_offset": list(offsets),
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "tokens": [self._token(entry.token_id)[0] for entry in entries],
            "top_logprobs": [self._alternatives(entry) for entry in entries],
        }

    def _alternatives(self, entry: TokenLogprobs) -> dict[str, float]:
        """Text to logprob, the chosen token always among them; of tokens with one text the likeliest counts."""
        alternatives: dict[str, float] = {}
        for token_id, logprob in [*self._top(entry), (entry.token_id, _finite(entry.logprob))]:
            alternatives.setdefault(self._token(token_id)[0], logprob)
        return alternatives

    def echo(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs], text: str) -> dict[str, Any]:
        """`logprobs` of a prompt that is shown as `text`: nothing predicts its first token."""
        offset, *offsets = self._offsets(token_ids, text)
        form = self.completion(entries, offsets)
        token = self._token(token_ids[0])[0]
        first = {"text_offset": offset, "token_logprobs": None, "tokens": token, "top_logprobs": None}
        return {name: [value, *form[name]] for name, value in first.items()}

    def _offsets(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Where each token begins in `text`, which may lack what the tokenizer put in front of it (BOS): that is at 0."""
        detokenizer = self._service.tokenizer.detokenizer((), skip_special_tokens=False)
        lengths = [len(detokenizer.feed((token_id,))) for token_id in token_ids]
        num_hidden = max(0, sum(lengths) + len(detokenizer.finish()) - len(text))
        return [min(max(0, start - num_hidden), len(text)) for start in accumulate(lengths[:-1], initial=0)]

    # --- vLLM's prompt_logprobs

    def prompt(self, entries: Sequence[TokenLogprobs]) -> list[dict[int, dict[str, Any]] | None]:
        """A map from token id to logprob, rank and text for each position but the first."""
        return [None, *(self._prompt_entry(entry) for entry in entries)]

    def _prompt_entry(self, entry: TokenLogprobs) -> dict[int, dict[str, Any]]:
        rows = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(self._top(entry), 1)}
        rows[entry.token_id] = (_finite(entry.logprob), entry.rank)
        return {
            token_id: {"logprob": logprob, "rank": rank, "decoded_token": self._service.logprob_token(token_id)[0]}
            for token_id, (logprob, rank) in rows.items()
        }
