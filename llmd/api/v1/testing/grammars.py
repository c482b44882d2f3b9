"""Grammars: masks and `accept` agree token for token, over a vocabulary of single bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmd.api.v1 import CompiledGrammar, GrammarCompiler, GrammarContext, GrammarMatcher
from llmd.api.v1.testing.compare import require

EOS = 256
BYTES = GrammarContext(
    vocab_size=257,
    eos_token_ids=(EOS,),
    special_token_ids=frozenset({EOS}),
    token_bytes=lambda token_id: bytes([token_id]) if token_id < EOS else b"",
    encode=lambda text: list(text.encode()),
    tokenizer_json=lambda: None,
)


def check_grammar(
    build: Callable[[GrammarContext], GrammarCompiler],
    kind: str,
    source: str,
    *,
    accepts: Sequence[str],
    rejects: Sequence[str],
    bad_sources: Sequence[str] = (),
) -> None:
    """One constraint: texts that it accepts as a whole, texts that no continuation can mend, sources that are refused.

    Every token of 257 (256 bytes and an end) is a byte. Bits of `fill` are compared with what `accept` says, `forced` with
    the bits, and one matcher must know nothing of another.
    """
    compiler = build(BYTES)
    compiled = compiler.compile(kind, source)  # type: ignore[arg-type]  # a plugin may have kinds of its own
    for text in accepts:
        _check_accepted(compiled, text)
    for text in rejects:
        _check_rejected(compiled, text)
    for bad in bad_sources:
        try:
            compiler.compile(kind, bad)  # type: ignore[arg-type]
        except ValueError:
            continue
        raise AssertionError(f"{kind} {bad!r} compiles; expected: ValueError with the reason")


def _allowed(matcher: GrammarMatcher) -> np.ndarray:
    words = np.full(-(-BYTES.vocab_size // 32), 0x55555555, dtype=np.int32)  # what was there before must not count
    matcher.fill(words)
    return np.unpackbits(words.view(np.uint8), bitorder="little")[: BYTES.vocab_size].astype(bool)


def _check_accepted(compiled: CompiledGrammar, text: str) -> None:
    matcher = compiled.matcher()
    for place, token_id in enumerate(text.encode()):
        allowed, where = _allowed(matcher), f"after {text.encode()[:place]!r}"
        require(bool(allowed[token_id]), f"{where}: {bytes([token_id])!r} of an accepted text has no bit")
        forced = matcher.forced()
        if forced:
            require(list(np.flatnonzero(allowed)) == forced[:1], f"{where}: {forced[:1]} is forced, the mask allows others")
        require(matcher.accept([token_id]), f"{where}: accept refuses {bytes([token_id])!r}, whose bit is set")
    if not matcher.finished:
        require(bool(_allowed(matcher)[EOS]), f"after all of {text!r}: the end has no bit")


def _check_rejected(compiled: CompiledGrammar, text: str) -> None:
    matcher = compiled.matcher()
    for token_id in text.encode():
        if matcher.finished:
            return
        is_allowed = bool(_allowed(matcher)[token_id])
        require(
            matcher.accept([token_id]) == is_allowed, f"{text!r}: the mask and accept differ about {bytes([token_id])!r}"
        )
        if not is_allowed:
            return
    at_end = matcher.finished or bool(_allowed(matcher)[EOS])
    require(not at_end, f"{text!r} is accepted; expected: rejected")
