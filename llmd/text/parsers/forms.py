"""How a tool format writes its calls, as a grammar: what makes a model call, and call as the function's schema says.

    CallForm ─► constraint(tools, choice) ─► Lark, with added tokens by their ids ─► a grammar plugin

`choice` is the name of a function, "required" (one or more calls of any), or "auto": free text in which no call can begin
but one that follows its schema to the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llmd.text.parsers.schemas import ToolSchemas

if TYPE_CHECKING:
    from llmd.text.structured import Constraint

MAX_CALLS = 16
ANY_TEXT = "/(?s:.*)/"
# JSON as chat templates write it, and no white space beyond that
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# white space that a parser skips in front of what may be a call
_SPACE = r"\s\x{1c}-\x{1f}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"


class Unforceable(ValueError):
    """A function whose arguments cannot be held to its schema in this format, with the reason."""


class Function(NamedTuple):
    """A function and the schema of its arguments; with `is_strict` off they need not follow it, where that can be."""

    name: str
    parameters: Mapping[str, Any]
    is_strict: bool = True


class GrammarWriter:
    """Writes rules, equal ones once. `added_tokens` are the tokenizer's: between quotes their text means its characters."""

    def __init__(self, added_tokens: Mapping[int, str] | None = None) -> None:
        ids = {text: token_id for token_id, text in (added_tokens or {}).items() if text}
        longest_first = sorted(ids, key=len, reverse=True)
        self._ids = ids
        self._added = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if ids else None
        self._names: dict[str, str] = {}

    def lines(self) -> list[str]:
        """The rules."""
        return [f"{name}{body}" for body, name in self._names.items()]

    def rule(self, body: str) -> str:
        """The name of a rule."""
        return self._named("rule", f": {body}")

    def terminal(self, body: str, *, lazy: bool = False) -> str:
        """The name of a terminal: lazy ones end at the first place where they can."""
        return self._named("lazy", f"[lazy]: {body}") if lazy else self._named("TEXT", f": {body}")

    def json(self, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> str:
        """The name of a rule for JSON text that follows a schema; its references are into `root`."""
        shared = {key: root[key] for key in ("$defs", "definitions") if root is not None and key in root}
        text = json.dumps({**shared, **schema, "x-guidance": COMPACT}, ensure_ascii=False)
        return self.rule(f"%json {text}")

    def _named(self, prefix: str, body: str) -> str:
        return self._names.setdefault(body, f"{prefix}_{len(self._names)}")

    def _parts(self, text: str) -> list[str]:
        return [part for part in (self._added.split(text) if self._added is not None else [text]) if part]

    def text(self, text: str) -> str:
        """Terms for a fixed text."""
        return " ".join(self._term(part) for part in self._parts(text))

    def _term(self, part: str) -> str:
        return f"<[{self._ids[part]}]>" if part in self._ids else json.dumps(part, ensure_ascii=False)

    def upto(self, body: str, end: str) -> str:
        """Terms for what the terminal `body` describes, and the fixed text that ends it."""
        first, *more = self._parts(end)
        if first in self._ids:
            return f"{body} {self.text(end)}"
        both = self.terminal(f"{body} {self._term(first)}", lazy=not more)  # an added token ends a text by itself
        return " ".join([both, *map(self._term, more)])


def without(texts: Sequence[str]) -> str:
    """The body of a terminal: any text in which none of these stands."""
    return f"{ANY_TEXT} & ~/(?s:.*({'|'.join(map(quoted, texts))}).*)/" if texts else ANY_TEXT


def quoted(text: str) -> str:
    """A text as a regular expression between slashes, in one line."""
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


Call = Callable[[GrammarWriter, Function, int], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """A format: `begin call between call … end`.

    `call(writer, function, number)` gives the terms of one call, or raises Unforceable. `opens` is what the parser takes
    for a beginning anywhere, the first of them how `begin` begins; `starts` are characters that begin a call at the start
    of the answer, for formats without a tag. `lead` may write what can stand in front of it all; `free`, what else than
    calls there may be under "auto", where that is more than text.
    """

    call: Call
    begin: str = ""
    between: str = ""
    end: str = ""
    opens: tuple[str, ...] = ()
    starts: str = ""
    max_calls: int = MAX_CALLS
    is_numbered: bool = False  # a call's text has its number in it
    lead: Callable[[GrammarWriter], str] | None = None
    free: Callable[[GrammarWriter], str] | None = None

    def constraint(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str,
        *,
        parallel: bool = True,
        added_tokens: Mapping[int, str] | None = None,
    ) -> Constraint | None:
        """A Lark grammar; None without tools to choose from. Raises Unforceable."""
        from llmd.text.structured import Constraint

        schemas = ToolSchemas(tools)
        names = [name for name in schemas.names if choice in (name, "required", "auto")]
        if not names:
            return None
        writer = GrammarWriter(added_tokens)
        strict = schemas.strict if choice == "auto" else frozenset(names)
        functions = [Function(name, schemas.parameters(name), name in strict) for name in names]
        num_calls = self.max_calls if parallel and choice in ("required", "auto") else 1
        calls = self._calls(writer, functions, num_calls)
        start = self._auto(writer, calls) if choice == "auto" else f"{self._lead(writer)} {writer.text(self.begin)} {calls}"
        source = "\n".join([f"start: {start}", *writer.lines()])
        return Constraint("lark", source, "tools" if choice == "auto" else "tool_choice")

    def _lead(self, writer: GrammarWriter) -> str:
        return self.lead(writer) if self.lead is not None else ""

    def _calls(self, writer: GrammarWriter, functions: Sequence[Function], num_calls: int) -> str:
        """All behind `begin`."""
        between, end = writer.text(self.between), writer.text(self.end)
        if not self.is_numbered:
            call = self._any_call(writer, functions, 0)
            return f"{call} ({between} {call}){{0,{num_calls - 1}}} {end}" if num_calls > 1 else f"{call} {end}"
        rest = ""
        for number in range(num_calls - 1, 0, -1):
            rest = f"({between} {self._any_call(writer, functions, number)} {rest})?"
            rest = writer.rule(rest)
        return f"{self._any_call(writer, functions, 0)} {rest} {end}"

    def _any_call(self, writer: GrammarWriter, functions: Sequence[Function], number: int) -> str:
        return writer.rule(" | ".join(self.call(writer, function, number) for function in functions))

    def _auto(self, writer: GrammarWriter, calls: str) -> str:
        """Text, and calls behind it or none."""
        if self.free is not None:
            return f"{self.free(writer)} | {self._lead(writer)} {writer.text(self.begin)} {calls}"
        if self.starts:
            bare = f"/(?s:[ \\t\\r\\n]*([^{_SPACE}{''.join(map(quoted, self.starts))}].*)?)/"
            free = writer.terminal(f"{bare} & ~/(?s:.*({'|'.join(map(quoted, self.opens))}).*)/")
            return f"{writer.text(self.begin)} {calls} | {free}"
        free = writer.terminal(without(self.opens))
        rest = writer.text(self.begin.removeprefix(self.opens[0]))
        return f"{free} | {writer.upto(free, self.opens[0])} {rest} {calls}"


def json_call(head: str, tail: str, *, name: Callable[[str], str] = json.dumps) -> Call:
    """A call whose arguments are one JSON object between two texts, which may hold {name} and {number}."""

    def call(writer: GrammarWriter, function: Function, number: int) -> str:
        before, after = (
            text.replace("{name}", name(function.name)).replace("{number}", str(number)) for text in (head, tail)
        )
        arguments = writer.json({"type": "object", **(function.parameters if function.is_strict else {})})
        return f"{writer.text(before)} {arguments} {writer.text(after)}"

    return call


def plain_name(name: str) -> str:
    """A function's name as it is; raises Unforceable for one that would not be read again."""
    if not re.fullmatch(r"[\w.:/$@-]+", name):
        raise Unforceable(f"the function's name {name[:64]!r} cannot be written in this format")
    return name
