"""Structured output by xgrammar (C++), where it is installed: `structured_outputs_backend = "xgrammar"`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import GrammarSpec, hookimpl
from llmd_plugins.grammars.json_schemas import first_line
from llmd_plugins.grammars.structural_tags import MAX_DEPTH, newer_form
from llmd_plugins.grammars.xgrammar_schemas import held_schema

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from llmd.api.v1 import CompiledGrammar, GrammarContext, GrammarMatcher

MAX_WHITESPACE = 33  # between two JSON tokens; a newline and an indentation


class XgrammarCompiler:
    """Compiles for one tokenizer."""

    def __init__(self, context: GrammarContext) -> None:
        import xgrammar

        special = context.special_token_ids
        vocabulary = [
            b"" if token_id in special else context.token_bytes(token_id) for token_id in range(context.vocab_size)
        ]
        info = xgrammar.TokenizerInfo(
            vocabulary, vocab_size=context.vocab_size, stop_token_ids=list(context.eos_token_ids) or None
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, kind: str, source: str) -> CompiledGrammar:
        """Compile; raises ValueError with xgrammar's reason."""
        try:
            return XgrammarGrammar(self._compile(kind, source))
        except RuntimeError as error:
            raise ValueError(first_line(str(error))) from error

    def _compile(self, kind: str, source: str) -> Any:
        if kind in ("json", "json_object"):
            schema = held_schema(source) if kind == "json" else '{"type": "object"}'
            return self._compiler.compile_json_schema(schema, max_whitespace_cnt=MAX_WHITESPACE)
        if kind == "regex":
            return self._compiler.compile_regex(source)
        if kind == "structural_tag":
            return self._compiler.compile_structural_tag(_held_tag(source))
        if kind == "choice":
            source = "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(source))
        return self._compiler.compile_grammar(source)


class XgrammarGrammar:
    """A compiled grammar, shared."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def matcher(self) -> GrammarMatcher:
        """Start at the beginning."""
        from xgrammar import GrammarMatcher as Matcher

        return XgrammarMatcher(Matcher(self._compiled))


class XgrammarMatcher:
    """Follows one sequence."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def accept(self, token_ids: Sequence[int]) -> bool:
        """Advance over tokens."""
        return all(self._matcher.accept_token(token_id) for token_id in token_ids)

    def fill(self, mask_row: npt.NDArray[np.int32]) -> None:
        """Write the next mask."""
        self._matcher.fill_next_token_bitmask(mask_row[None, :])

    def forced(self) -> list[int]:
        """None: xgrammar forces strings, whose tokens would be a guess."""
        return []

    @property
    def finished(self) -> bool:
        """Whether an end-of-sequence token was accepted."""
        return bool(self._matcher.is_terminated())


def _held_tag(source: str) -> str:
    """A structural tag in the newer form, its schemas as they are held."""
    tag = json.loads(source)
    if isinstance(tag, dict) and "structures" in tag:
        tag = {"type": "structural_tag", "format": newer_form(tag)}
    return json.dumps(_held_within(tag, 0), ensure_ascii=False)


def _held_within(part: Any, depth: int) -> Any:
    if depth > 2 * MAX_DEPTH:
        raise ValueError(f"the structural tag is nested more than {MAX_DEPTH} deep")
    if isinstance(part, list):
        return [_held_within(each, depth + 1) for each in part]
    if not isinstance(part, dict):
        return part
    if "json_schema" in part:
        return _json_content(part)
    return {key: _held_within(value, depth + 1) for key, value in part.items()}


def _json_content(part: dict[str, Any]) -> dict[str, Any]:
    """A schema within a tag as a grammar: left as it is, its white space would have no bound."""
    import xgrammar

    if part.get("type") != "json_schema":
        raise ValueError(f"the format {part.get('type')!r} of a structural tag is not served"[:200])
    schema = held_schema(json.dumps(part["json_schema"]))
    grammar = xgrammar.Grammar.from_json_schema(schema, max_whitespace_cnt=MAX_WHITESPACE)
    return {"type": "grammar", "grammar": str(grammar)}


@hookimpl
def llmd_register_grammars() -> list[GrammarSpec]:
    """Behind llguidance unless the configuration names it."""
    return [
        GrammarSpec(
            name="xgrammar",
            summary="JSON schema, regex, choice, EBNF, structural tags (C++)",
            kinds=("json", "json_object", "regex", "choice", "grammar", "structural_tag"),
            build=XgrammarCompiler,
            order=20,
        )
    ]
