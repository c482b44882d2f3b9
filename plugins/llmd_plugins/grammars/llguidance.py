"""Structured output by llguidance (Rust): JSON schema, regular expressions, choices, EBNF and Lark grammars, tags."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import GrammarSpec, hookimpl

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from llmd.api.v1 import CompiledGrammar, GrammarContext, GrammarMatcher

# Whitespace between JSON tokens: pretty-printing in any depth that a reader bears, never an endless run of it.
WHITESPACE = r"[ \t]|\r?\n[ \t]{0,32}"
JSON_OPTIONS: Any = {"whitespace_pattern": WHITESPACE}


LEXER_FUEL = 100_000  # a tenth of the library's own: a regex of a thousand thousands is refused within milliseconds


class LlguidanceCompiler:
    """Compiles for one tokenizer."""

    def __init__(self, context: GrammarContext) -> None:
        import llguidance

        tokenizer: Any = context.tokenizer_json() or llguidance.TokenizerWrapper(_Vocabulary(context))
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer, n_vocab=context.vocab_size, eos_token=list(context.eos_token_ids) or None
        )

    def compile(self, kind: str, source: str) -> CompiledGrammar:
        """Compile and take a step, so that what is too complex fails here and not while others wait."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False, initial_lexer_fuel=LEXER_FUEL)
        matcher = LLMatcher(self._tokenizer, _grammar(kind, source), log_level=0, limits=limits)
        probe = matcher.deep_copy()
        if not probe.is_error():
            allowed = int.from_bytes(probe.compute_bitmask(), "little")
            first = (allowed & -allowed).bit_length() - 1
            if first >= 0 and not probe.is_error():
                probe.consume_tokens([first])
        if probe.is_error():
            raise ValueError(_reason(probe.get_error()))
        return LlguidanceGrammar(matcher)


class LlguidanceGrammar:
    """A matcher at the beginning, copied for every sequence."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def matcher(self) -> GrammarMatcher:
        """Start at the beginning."""
        return LlguidanceMatcher(self._matcher.deep_copy())


class LlguidanceMatcher:
    """Follows one sequence."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def accept(self, token_ids: Sequence[int]) -> bool:
        """Advance over tokens."""
        return bool(self._matcher.consume_tokens(list(token_ids)))

    def fill(self, mask_row: npt.NDArray[np.int32]) -> None:
        """Write the next mask; raises when the grammar has become too complex to go on."""
        self._matcher.unsafe_compute_mask_ptr(mask_row.ctypes.data, mask_row.nbytes)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())

    def forced(self) -> list[int]:
        """Tokens that must come next."""
        return list(self._matcher.compute_ff_tokens())

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())


class _Vocabulary:
    """A tokenizer without tokenizer.json, as llguidance wants to see one."""

    def __init__(self, context: GrammarContext) -> None:
        self.tokens = [context.token_bytes(token_id) for token_id in range(context.vocab_size)]
        self.special_token_ids = sorted(context.special_token_ids)
        self.eos_token_id = context.eos_token_ids[0] if context.eos_token_ids else None
        self.bos_token_id = None
        self._encode = context.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _grammar(kind: str, source: str) -> str:
    """A constraint in llguidance's own form."""
    from llguidance import LLMatcher, grammar_from

    if kind in ("json", "json_object"):
        return LLMatcher.grammar_from_json_schema(source if kind == "json" else '{"type": "object"}', defaults=JSON_OPTIONS)
    if kind == "structural_tag":
        return _structural_tag(json.loads(source))
    if kind == "choice":  # one expression: as rules, thousands of them are more than the parser looks at
        kind, source = "regex", "|".join(re.escape(choice) for choice in json.loads(source))
    return grammar_from("regex" if kind == "regex" else "grammar", source)


def _reason(error: str) -> str:
    """The library's message without its marks; one of them means that the grammar has no words."""
    text = error.replace("<non-verbose/>", "").strip()
    return "nothing follows it" if text == "NoExtensionBias" else text


def _structural_tag(tag: dict[str, Any]) -> str:
    """`{"structures": [{"begin", "schema", "end"}], "triggers": [...]}` (vLLM's form)."""
    from llguidance import LLMatcher, StructTag

    if "structures" not in tag or "triggers" not in tag:
        raise ValueError("a structural tag needs 'structures' and 'triggers'")
    tags = []
    for structure in tag["structures"]:
        trigger = next((trigger for trigger in tag["triggers"] if structure["begin"].startswith(trigger)), None)
        if trigger is None:
            raise ValueError(f"no trigger begins {structure['begin']!r}")
        tags.append(StructTag(trigger=trigger, begin=structure["begin"], grammar=structure["schema"], end=structure["end"]))
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False))


@hookimpl
def llmd_register_grammars() -> list[GrammarSpec]:
    """The default for every kind of constraint."""
    return [
        GrammarSpec(
            name="llguidance",
            summary="JSON schema, regex, choice, EBNF and Lark, structural tags (Rust, lazy automata)",
            kinds=("json", "json_object", "regex", "choice", "grammar", "structural_tag"),
            build=LlguidanceCompiler,
            order=10,
        )
    ]
