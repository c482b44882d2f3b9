"""Structural tags as Lark grammars: text that is free up to a trigger, and what must follow each.

vLLM takes two forms: `{"structures": [{begin, schema, end}], "triggers": […]}` and, newer, xgrammar's
`{"type": "structural_tag", "format": {…}}` with formats of several types in each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

MAX_DEPTH = 16
_ANY = "/(?s:.*)/"


class TagWriter:
    """Writes the rules of one structural tag; `exact` makes a JSON schema ready."""

    def __init__(self, exact: Callable[[str], str]) -> None:
        self._exact = exact
        self._lines: list[str] = []
        self._types: dict[str, Callable[[dict[str, Any], int], str]] = {
            "const_string": lambda part, depth: _literal(_text(part, "value")),
            "json_schema": lambda part, depth: self._json(part.get("json_schema", {})),
            "any_text": lambda part, depth: self._free(part),
            "regex": lambda part, depth: self._terminal(_regex(_text(part, "pattern"))),
            "sequence": lambda part, depth: " ".join(self._part(each, depth) for each in _parts(part, "elements")),
            "or": lambda part, depth: " | ".join(self._part(each, depth) for each in _parts(part, "elements")),
            "tag": self._tag,
            "triggered_tags": self._triggered,
            "tags_with_separator": self._separated,
        }

    def write(self, tag: dict[str, Any]) -> str:
        """The grammar. Raises ValueError, naming what is wrong or not served."""
        if "structures" in tag or "triggers" in tag:
            tag = {"format": newer_form(tag)}
        if not isinstance(tag.get("format"), dict):
            raise ValueError("a structural tag needs 'format', or 'structures' and 'triggers'")
        start = self._part(tag["format"], 0)
        return "\n".join([f"start: {start}", *self._lines])

    # --- rules

    def _rule(self, body: str) -> str:
        name = f"part_{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def _terminal(self, body: str, *, lazy: bool = False) -> str:
        name = f"{'part' if lazy else 'PART'}_{len(self._lines)}"
        self._lines.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def _json(self, schema: Any) -> str:
        return self._rule(f"%json {self._exact(json.dumps(schema))}")

    def _part(self, part: Any, depth: int) -> str:
        """The name of the rule that a format becomes."""
        if depth > MAX_DEPTH:
            raise ValueError(f"the structural tag is nested more than {MAX_DEPTH} deep")
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in self._types:
            raise ValueError(
                f"the format {kind!r} of a structural tag is not served; served: {', '.join(self._types)}"[:300]
            )
        return self._rule(self._types[kind](part, depth + 1))

    # --- formats

    def _free(self, part: dict[str, Any]) -> str:
        barred = [str(each) for each in part.get("excludes") or ()]
        return self._terminal(_without(barred))

    def _tag(self, part: dict[str, Any], depth: int) -> str:
        """begin, content, end; any text lasts up to the end."""
        begin, ends = _text(part, "begin"), part.get("end", "")
        ends = [ends] if isinstance(ends, str) else [str(each) for each in ends or ()]
        content = part.get("content")
        if isinstance(content, dict) and content.get("type") == "any_text" and all(ends):
            inner = " | ".join(self._terminal(f"{_ANY} {_literal(end)}", lazy=True) for end in ends)
            return f"{_literal(begin)} ({inner})"
        closing = " | ".join(_literal(end) for end in ends if end)
        return f"{_literal(begin)} {self._part(content, depth)} {f'({closing})' if closing else ''}"

    def _triggered(self, part: dict[str, Any], depth: int) -> str:
        """Free text in which what a trigger begins must be one of the tags."""
        triggers = [str(each) for each in _parts(part, "triggers")]
        barred = [str(each) for each in part.get("excludes") or ()]
        tags = _parts(part, "tags")
        options = []
        for tag in tags:
            trigger = next((each for each in triggers if _text(tag, "begin").startswith(each)), None)
            if trigger is None:
                raise ValueError(f"no trigger begins {_text(tag, 'begin')!r}"[:300])
            rest = self._tag({**tag, "begin": tag["begin"].removeprefix(trigger)}, depth)
            options.append((trigger, self._rule(rest)))
        free = _without([*triggers, *barred])
        begun = {trigger: self._terminal(f"{free} {_literal(trigger)}", lazy=True) for trigger in dict(options)}
        each = self._rule(" | ".join(f"{begun[trigger]} {rest}" for trigger, rest in options))
        first = self._rule(" | ".join(f"{_literal(trigger)} {rest}" for trigger, rest in options))
        tail = "" if part.get("stop_after_first") else f"{each}* {self._terminal(free)}"
        if part.get("at_least_one"):  # then nothing stands before the first
            return f"{first} {tail}"
        return tail or f"{each} | {self._terminal(free)}"

    def _separated(self, part: dict[str, Any], depth: int) -> str:
        tags = self._rule(" | ".join(self._rule(self._tag(each, depth)) for each in _parts(part, "tags")))
        separator = part.get("separator", "")
        more = "" if part.get("stop_after_first") else f"({_literal(separator) if separator else ''} {tags})*"
        whole = f"{tags} {more}"
        return whole if part.get("at_least_one") else f"({whole})?"


def newer_form(tag: dict[str, Any]) -> dict[str, Any]:
    """The older form in the newer one's words."""
    if not isinstance(tag.get("structures"), list) or not isinstance(tag.get("triggers"), list):
        raise ValueError("a structural tag needs 'structures' and 'triggers'")
    tags = [
        {"begin": _text(each, "begin"), "content": {"type": "json_schema", "json_schema": each.get("schema", {})},
         "end": each.get("end", "")}
        for each in _parts(tag, "structures")
    ]  # fmt: skip
    return {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}


def _text(part: Any, key: str) -> str:
    value = part.get(key) if isinstance(part, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{key!r} of a structural tag must be a string")
    return value


def _parts(part: dict[str, Any], key: str) -> Sequence[Any]:
    value = part.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} of a structural tag must be a list with something in it")
    return value


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _regex(pattern: str) -> str:
    """A regular expression between slashes."""
    return "/" + pattern.replace("/", "\\/") + "/"


def _without(barred: Sequence[str]) -> str:
    """Any text in which none of these stands."""
    if not barred:
        return _ANY
    words = "|".join(_quoted(word) for word in barred)
    return f"{_ANY} & ~/(?s:.*({words}).*)/"


def _quoted(text: str) -> str:
    """A text as a regular expression between slashes, in one line."""
    return "".join(
        char if char.isalnum() else "\\n" if char == "\n" else "\\r" if char == "\r" else f"\\x{{{ord(char):x}}}"
        for char in text
    )
