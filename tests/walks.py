"""Random walks through grammars: a model that says anything a mask allows."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np

from llmd.engine.grammar import bitmask_words
from llmd.text.structured import GrammarContext
from llmd.text.tokenizer import Tokenizer

_ENDS = frozenset(b'"]}>)\n')
_SHORT = (frozenset(b"nul"), frozenset(b"falsetr0123456789"), frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789:-.,ABC "))


def grammar_context(tokenizer: Tokenizer, *, with_json: bool = True) -> GrammarContext:
    """What a grammar plugin needs to know of a tokenizer."""
    return GrammarContext(
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=(tokenizer.eos_token_id,),
        special_token_ids=frozenset(tokenizer.special_ids),
        token_bytes=tokenizer.token_bytes,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        tokenizer_json=lambda: tokenizer.serialized if with_json else None,
    )


def allowed(matcher, vocab_size: int) -> list[int]:
    """The tokens that may follow."""
    row = np.full(bitmask_words(vocab_size), -1, dtype=np.int32)
    matcher.fill(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[:vocab_size]).tolist()


class Walk(NamedTuple):
    """`token_ids` without what ends them; `num_forced` of them were forced."""

    token_ids: list[int]
    is_finished: bool
    num_forced: int


class Walker:
    """Draws tokens as masks allow them: `haste` is the share of draws that prefer what closes to what goes on."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._eos = tokenizer, tokenizer.eos_token_id
        parts = [frozenset(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size)]
        ranks = [next((rank for rank, chars in enumerate((_ENDS, *_SHORT)) if part <= chars), 9) for part in parts]
        self._ranks = [rank if part else 9 for rank, part in zip(ranks, parts, strict=True)]

    def walk(
        self,
        grammar,
        seed: int,
        *,
        free: int = 60,
        limit: int = 1500,
        haste: float = 0.5,
        forces: bool = True,
        endings: tuple[str, ...] = (),
    ) -> Walk:
        """`free` draws at will, then the shortest way to an end: that one is found shows that the text so far could go on.

        `endings` are texts that may end what is open, tried now and then.
        """
        chance, matcher, ids, num_forced = random.Random(seed), grammar.matcher(), [], 0
        tried: list[int] = []
        while not matcher.finished and len(ids) < limit:
            if forces and (forced := matcher.forced()):
                assert matcher.accept(forced), "what is forced is refused"
                ids += forced
                num_forced += len(forced)
                continue
            choices = allowed(matcher, self._tokenizer.vocab_size)
            assert choices, f"a dead end behind {self._tokenizer.decode(ids)!r}"
            in_haste = len(ids) > free or chance.random() < haste
            if in_haste and endings and not tried and chance.random() < 0.2:
                tried = self._tokenizer.encode(chance.choice(endings), add_special_tokens=False)[::-1]
            tried = tried if tried and tried[-1] in choices else []
            token_id = (
                tried.pop()
                if tried
                else self._draw(choices, chance, in_haste=in_haste, may_end=len(ids) > free or chance.random() < 0.5)
            )
            assert matcher.accept([token_id]), "what the mask allows is refused"
            ids.append(token_id)
        is_finished = matcher.finished or ids[-1:] == [self._eos]
        return Walk([token_id for token_id in ids if token_id != self._eos], is_finished, num_forced)

    def _draw(self, choices: list[int], chance: random.Random, *, in_haste: bool, may_end: bool) -> int:
        if self._eos in choices and (may_end or len(choices) == 1):
            return self._eos
        choices = [token_id for token_id in choices if token_id != self._eos] or choices
        if in_haste and chance.random() < 0.9:
            best = min(self._ranks[token_id] for token_id in choices)
            choices = [token_id for token_id in choices if self._ranks[token_id] == best]
        return chance.choice(choices)
