"""Structured output by xgrammar (C++), where it is installed: `structured_outputs_backend = "xgrammar"`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import GrammarSpec, hookimpl

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
            raise ValueError(str(error).strip().splitlines()[-1]) from error

    def _compile(self, kind: str, source: str) -> Any:
        if kind in ("json", "json_object"):
            schema = source if kind == "json" else '{"type": "object"}'
            return self._compiler.compile_json_schema(schema, max_whitespace_cnt=MAX_WHITESPACE)
        if kind == "regex":
            return self._compiler.compile_regex(source)
        if kind == "structural_tag":
            return self._compiler.compile_structural_tag(source)
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
