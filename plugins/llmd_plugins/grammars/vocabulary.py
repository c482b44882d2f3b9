"""A model's vocabulary as llguidance wants to see one: bytes of tokens, and a text in tokens that are never special."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmd.api.v1 import GrammarContext


class Vocabulary:
    """Special tokens stand for no text: a grammar that has their text in it means its characters.

    Left to itself the library reads forced text as a prompt is read, with `<|im_end|>` as one token, and then refuses what
    it has forced.
    """

    def __init__(self, context: GrammarContext) -> None:
        self.tokens = [context.token_bytes(token_id) for token_id in range(context.vocab_size)]
        self.special_token_ids = sorted(context.special_token_ids)
        self.eos_token_id = context.eos_token_ids[0] if context.eos_token_ids else None
        self.bos_token_id = None
        self._special = context.special_token_ids
        self._encode = _plain_encoder(context)
        self._by_bytes: dict[bytes, int] = {}

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens whose bytes are those of the text, the usual ones where that can be."""
        raw = text.encode() if isinstance(text, str) else text
        token_ids = self._encode(raw.decode(errors="replace"))
        usual = all(token_id not in self._special for token_id in token_ids)
        if usual and b"".join([self.tokens[token_id] for token_id in token_ids]) == raw:
            return token_ids
        return self._longest(raw)

    def _longest(self, raw: bytes) -> list[int]:
        """The longest tokens one after the other, for a tokenizer that adds something or drops it."""
        if not self._by_bytes:
            self._by_bytes = {part: i for i, part in enumerate(self.tokens) if part and i not in self._special}
        found, at, longest = [], 0, max(map(len, self._by_bytes), default=0)
        while at < len(raw):
            ends = range(min(len(raw), at + longest), at, -1)
            end = next((end for end in ends if raw[at:end] in self._by_bytes), None)
            if end is None:
                break  # what no token begins is not forced
            found.append(self._by_bytes[raw[at:end]])
            at = end
        return found


def _plain_encoder(context: GrammarContext) -> Callable[[str], list[int]]:
    """How the model's tokenizer encodes text that has no special tokens in it."""
    serialized = context.tokenizer_json()
    if serialized is None:
        return context.encode
    from tokenizers import Tokenizer

    parts = json.loads(serialized)
    parts["added_tokens"] = [
        token for token in parts.get("added_tokens") or () if token["id"] not in context.special_token_ids
    ]
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
