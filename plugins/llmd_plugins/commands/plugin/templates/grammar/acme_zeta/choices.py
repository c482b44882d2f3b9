"""Compiled on a pool thread; a matcher is touched by the loop thread and one pool thread, never by both at once."""

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llmd.api.v1 import GrammarContext

_MAX_CHOICES, _MAX_BYTES = 1000, 10_000


class Compiler:
    """Knows the bytes of every token of one model."""

    def __init__(self, context: GrammarContext) -> None:
        special = context.special_token_ids
        self.texts = [b"" if i in special else context.token_bytes(i) for i in range(context.vocab_size)]
        self.eos = context.eos_token_ids

    def compile(self, kind: str, source: str) -> "Choices":
        """Raises ValueError, whose text the client sees."""
        try:
            choices = json.loads(source)
        except ValueError:
            raise ValueError("the choices are no JSON") from None
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
            raise ValueError("choices must be a list of strings that is not empty")
        encoded = [choice.encode() for choice in choices]
        if len(encoded) > _MAX_CHOICES or max(map(len, encoded)) > _MAX_BYTES:
            raise ValueError(f"too much: at most {_MAX_CHOICES} choices of {_MAX_BYTES} bytes")
        return Choices(self, encoded)


class Choices:
    """Immutable, shared between requests."""

    def __init__(self, compiler: Compiler, choices: list[bytes]) -> None:
        self.compiler, self.choices = compiler, choices

    def matcher(self) -> "Matcher":
        return Matcher(self)


class Matcher:
    """What of one sequence was written so far."""

    def __init__(self, grammar: Choices) -> None:
        self._grammar, self._written = grammar, b""
        self.finished = False

    def _rests(self) -> list[bytes]:
        written = self._written
        return [choice[len(written) :] for choice in self._grammar.choices if choice.startswith(written)]

    def accept(self, token_ids: Sequence[int]) -> bool:
        compiler = self._grammar.compiler
        for token_id in token_ids:
            rests = self._rests()
            if self.finished:
                return False
            if token_id in compiler.eos:
                if b"" not in rests:
                    return False
                self.finished = True
            elif not (text := compiler.texts[token_id]) or not any(rest.startswith(text) for rest in rests):
                return False
            else:
                self._written += text
        return True

    def fill(self, mask_row: npt.NDArray[np.int32]) -> None:
        rests = [rest for rest in self._rests() if rest]
        compiler = self._grammar.compiler
        allowed = np.zeros(32 * len(mask_row), np.uint8)
        for token_id, text in enumerate(compiler.texts):
            allowed[token_id] = bool(text) and any(rest.startswith(text) for rest in rests)
        if b"" in self._rests():
            allowed[list(compiler.eos)] = 1
        mask_row[:] = np.packbits(allowed, bitorder="little").view(np.int32)

    def forced(self) -> list[int]:
        return []  # a hint; the mask alone is right
