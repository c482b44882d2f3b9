"""Parsers: however a text is cut into pieces, what comes out is the same, and no text breaks them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llmd.api.v1 import Parser
from llmd.api.v1.testing.compare import require


@dataclass(frozen=True, slots=True)
class Parsed:
    """A whole answer: its text, its reasoning, and (name, arguments as JSON text) of each call."""

    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]


def parse(parser: Parser, pieces: Iterable[str]) -> Parsed:
    """Feed a fresh parser the pieces and add up what it says. AssertionError where its tool calls break their rules."""
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    deltas += parser.finish()
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for call in (delta.tool_call for delta in deltas if delta.tool_call is not None):
        if call.index not in names:
            require(bool(call.name and call.id), f"call {call.index} begins without a name or an id: {call}")
            require(call.index == len(names), f"call {call.index} begins after {len(names)} others; allowed: in order")
            names[call.index] = call.name or ""
        else:
            require(call.name is None and call.id is None, f"call {call.index} has its name or id told twice: {call}")
        arguments[call.index] = arguments.get(call.index, "") + call.arguments
    calls = tuple((name, arguments[index]) for index, name in names.items())
    return Parsed("".join(delta.content for delta in deltas), "".join(delta.reasoning for delta in deltas), calls)


def _cut(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(1, 12)))
    return [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]


def check_parser(
    build: Callable[[], Parser], texts: Sequence[str], *, expected: Sequence[Parsed] | None = None, seed: int = 0
) -> None:
    """Streaming = not streaming for each text, for every beginning of it too (an answer may end at max_tokens).

    `build` makes a fresh parser for an answer; `expected`, where given, is what each text comes to.
    """
    rng = random.Random(seed)
    for index, text in enumerate(texts):
        whole = parse(build(), [text])
        if expected is not None:
            require(whole == expected[index], f"{text!r} came to {whole}; expected: {expected[index]}")
        _check_cuts(build, text, whole, rng)
        for _ in range(5):
            beginning = text[: rng.randint(0, len(text))]
            _check_cuts(build, beginning, parse(build(), [beginning]), rng, num_cuts=2)


def _check_cuts(build: Callable[[], Parser], text: str, whole: Parsed, rng: random.Random, *, num_cuts: int = 15) -> None:
    for pieces in (list(text), *(_cut(text, rng) for _ in range(num_cuts))):
        found = parse(build(), pieces)
        require(found == whole, f"{pieces!r} came to {found}; the same text at once to {whole}")
