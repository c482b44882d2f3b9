"""Token ids into text as they come: never half a character, and in sum what decoding all ids at once gives.

A decoder of `tokenizers` is read once into rules that say what a token id adds to the text: a string, or bytes that are
part of a character. Pieces are cached by id, so a token costs a dict lookup; bytes wait until their character is whole.

    ids ──► piece by id ──► str: out at once
                       └──► bytes ──► pending ──► whole characters out, the rest waits

One difference to the full decode of `tokenizers`: there, an invalid byte token turns its whole run of byte tokens into
U+FFFD, valid characters before it too. Those are out already here, and only the invalid bytes become U+FFFD.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Piece = str | bytes  # bytes: not whole characters by themselves

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_EACH_BYTE = "llmd_each_byte"  # codec error handler: one U+FFFD for each invalid byte
_MAX_TOKENS_A_CHARACTER = 4
_MAX_WINDOW = 24  # tokens: past it, U+FFFD at the end is meant, not half a character


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class Detokenizer(Protocol):
    """The text of one sequence."""

    def prime(self, prompt_ids: Sequence[int]) -> None:
        """Take the prompt as what stands before: spaces and half characters at the border are right."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete."""

    def finish(self) -> str:
        """What is still waiting, bytes that never became a character as U+FFFD."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How a decoder makes text of tokens. `first` is set where the first token of a text is treated apart."""

    piece: Callable[[str], Piece]
    first: Callable[[str], Piece] | None = None
    errors: str = "replace"
    strip: tuple[str, int] | None = None  # so many of these characters are cut from the start of the text


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that stand for bytes in byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update((chr(256 + index), byte) for index, byte in enumerate(others))
    return alphabet


_BYTES = _byte_alphabet()


def _byte_level(token: str) -> Piece:
    try:
        raw = bytes([_BYTES[character] for character in token])
    except KeyError:  # an added token in plain text
        return token
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _byte_fallback(replacements: Sequence[tuple[str, str]], has_bytes: bool) -> Callable[[str], Piece]:
    def piece(token: str) -> Piece:
        for old, new in replacements:
            token = token.replace(old, new)
        if has_bytes and (match := _BYTE_TOKEN.fullmatch(token)):
            byte = int(match[1], 16)
            return chr(byte) if byte < 0x80 else bytes([byte])
        return token

    return piece


def _fallback_rules(steps: list[dict[str, Any]]) -> Rules | None:
    """Rules for Replace… ByteFallback? Fuse? Strip?, as converted SentencePiece models have it."""
    replacements: list[tuple[str, str]] = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    has_bytes = bool(steps) and steps[0]["type"] == "ByteFallback"
    steps = steps[1:] if has_bytes else steps
    is_fused = bool(steps) and steps[0]["type"] == "Fuse"
    steps = steps[1:] if is_fused else steps
    strip = None
    if is_fused and steps and steps[0]["type"] == "Strip" and steps[0]["stop"] == 0:
        step = steps.pop(0)
        strip = (step["content"], step["start"])
    if steps:
        return None
    return Rules(_byte_fallback(replacements, has_bytes), errors=_EACH_BYTE, strip=strip)


def _local_rules(decode: Callable[[list[str]], str]) -> Rules:
    """Rules for decoders that map each token alone, the first of a text apart (Metaspace, WordPiece, none)."""
    return Rules(lambda token: decode(["x", token])[1:], first=lambda token: decode([token]))


def read_rules(decoder: Any) -> Rules | None:
    """The rules of a `tokenizers` decoder; None when it is of a kind that needs its neighbours."""
    if decoder is None:
        return _local_rules(" ".join)
    spec = json.loads(decoder.__getstate__())
    steps = list(spec["decoders"]) if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return Rules(_byte_level)
    if kinds in (["Metaspace"], ["WordPiece"]):
        return _local_rules(decoder.decode)
    return _fallback_rules(steps)


class Pieces(dict[int, Piece]):
    """Token id → what it adds to the text, filled as ids are first seen; "" for ids that are silent."""

    def __init__(self, rules: Rules, token: Callable[[int], str | None], silent_ids: frozenset[int]) -> None:
        super().__init__()
        self.rules, self.token, self.silent_ids = rules, token, silent_ids

    def __missing__(self, token_id: int) -> Piece:
        token = None if token_id in self.silent_ids else self.token(token_id)
        piece = self[token_id] = "" if token is None else self.rules.piece(token)
        return piece

    def is_silent(self, token_id: int) -> bool:
        """Whether the decoder never sees this id: skipped, or not in the vocabulary."""
        return token_id in self.silent_ids or self.token(token_id) is None


class TableDetokenizer:
    """The exact and fast way, for decoders that have Rules."""

    __slots__ = ("_is_start", "_num_strip", "_pending", "_pieces")

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._pending = b""
        self._num_strip = pieces.rules.strip[1] if pieces.rules.strip else 0
        self._is_start = pieces.rules.first is not None or self._num_strip > 0

    def prime(self, prompt_ids: Sequence[int]) -> None:
        """Take the prompt as what stands before."""
        if self._is_start and not all(map(self._pieces.is_silent, reversed(prompt_ids))):
            self._is_start = False
        for token_id in prompt_ids[-_MAX_TOKENS_A_CHARACTER:]:
            self._append(self._pieces[token_id])

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete."""
        if len(token_ids) == 1 and not self._pending and not self._is_start:
            piece = self._pieces[token_ids[0]]
            if type(piece) is str:
                return piece
        return "".join([self._feed_one(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """What is still waiting, as U+FFFD."""
        pending, self._pending = self._pending, b""
        return codecs.utf_8_decode(pending, self._pieces.rules.errors, True)[0]

    def _feed_one(self, token_id: int) -> str:
        return self._feed_start(token_id) if self._is_start else self._append(self._pieces[token_id])

    def _append(self, piece: Piece) -> str:
        if isinstance(piece, str):
            return self.finish() + piece if self._pending and piece else piece
        text, used = codecs.utf_8_decode(self._pending + piece, self._pieces.rules.errors, False)
        self._pending = (self._pending + piece)[used:]
        return text

    def _feed_start(self, token_id: int) -> str:
        """The first tokens of a text."""
        if self._pieces.is_silent(token_id):
            return ""
        rules = self._pieces.rules
        if rules.first is not None:
            self._is_start = False
            return self._append(rules.first(self._pieces.token(token_id) or ""))
        return self._strip_start(self._append(self._pieces[token_id]))

    def _strip_start(self, text: str) -> str:
        content = self._pieces.rules.strip[0] if self._pieces.rules.strip else ""
        while self._num_strip and text.startswith(content):
            text = text[len(content) :]
            self._num_strip -= 1
        self._is_start = self._num_strip > 0 and not text
        return text


class CompactDetokenizer(TableDetokenizer):
    """Leaves out the spaces between added tokens that follow each other (spaces_between_special_tokens = false)."""

    __slots__ = ("_added_tokens", "_is_after_added")

    def __init__(self, pieces: Pieces, added_tokens: Mapping[int, str]) -> None:
        super().__init__(pieces)
        self._added_tokens = added_tokens
        self._is_after_added = False

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete."""
        return "".join(map(self._feed_compact, token_ids))

    def _feed_compact(self, token_id: int) -> str:
        raw = self._added_tokens.get(token_id)
        is_close, self._is_after_added = raw is not None and self._is_after_added, raw is not None
        return self._append(raw) if is_close and raw is not None else self._feed_one(token_id)


class WindowDetokenizer:
    """For any decoder: decodes the last few ids with and without the new ones and gives the difference."""

    __slots__ = ("_decode", "_ids", "_num_read", "_shown")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._num_read = 0  # of _ids, those whose text is out
        self._shown = ""  # their text

    def prime(self, prompt_ids: Sequence[int]) -> None:
        """Take the prompt as what stands before."""
        self._ids = list(prompt_ids[-2 * _MAX_TOKENS_A_CHARACTER :])
        self._num_read, self._shown = len(self._ids), self._decode(self._ids)

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete."""
        return "".join(map(self._feed_one, token_ids))

    def finish(self) -> str:
        """What is still waiting."""
        return self._advance(self._decode(self._ids))

    def _feed_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        is_partial = text.endswith("\ufffd") and len(self._ids) - self._num_read < _MAX_WINDOW
        return "" if is_partial or len(text) <= len(self._shown) else self._advance(text)

    def _advance(self, text: str) -> str:
        new = text[len(self._shown) :]
        del self._ids[: self._num_read]
        self._num_read, self._shown = len(self._ids), self._decode(self._ids)
        return new


def decode_all(detokenizer: Detokenizer, token_ids: Iterable[int]) -> str:
    """The whole text of a sequence."""
    return detokenizer.feed(list(token_ids)) + detokenizer.finish()
