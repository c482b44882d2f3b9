"""Structured output by llguidance (Rust): JSON schema, regular expressions, choices, EBNF and Lark grammars, tags."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmd.api.v1 import GrammarSpec, change_schemas, close_objects, hookimpl, read_json_schema, schemas_within
from llmd_plugins.grammars.json_schemas import check_counts, exact_formats
from llmd_plugins.grammars.structural_tags import TagWriter
from llmd_plugins.grammars.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from llmd.api.v1 import CompiledGrammar, GrammarContext, GrammarMatcher

# Whitespace between JSON tokens: pretty-printing in any depth that a reader bears, never an endless run of it.
WHITESPACE = r"[ \t]|\r?\n[ \t]{0,32}"
# No letter may be written as its number: a key that is named could come again under another spelling.
JSON_OPTIONS: Any = {"whitespace_pattern": WHITESPACE, "json_allowed_escapes": 'nrbtf\\"'}
_UNSPOKEN = re.compile(r"\\u00(?!08|09|0a|0c|0d)[01][0-9a-f]|\\u007f|\x7f")  # characters that JSON writes by number only


_JSON_RULE = re.compile(r"^(\s*\w+\s*:\s*%json\s+)(\{.*\})\s*$", re.MULTILINE)  # of a Lark grammar, in one line
LEXER_FUEL = 100_000  # a tenth of the library's own: a regex of a thousand thousands is refused within milliseconds


class LlguidanceCompiler:
    """Compiles for one tokenizer."""

    def __init__(self, context: GrammarContext) -> None:
        import llguidance

        wrapper: Any = llguidance.TokenizerWrapper(Vocabulary(context))
        self._tokenizer = llguidance.LLTokenizer(
            wrapper, n_vocab=context.vocab_size, eos_token=list(context.eos_token_ids) or None
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


def _grammar(kind: str, source: str) -> str:
    """A constraint in llguidance's own form."""
    from llguidance import LLMatcher, grammar_from

    if kind in ("json", "json_object"):
        return LLMatcher.grammar_from_json_schema(exact(source if kind == "json" else '{"type": "object"}'))
    if kind == "structural_tag":
        return LLMatcher.grammar_from_lark(TagWriter(exact).write(_object(source)))
    if kind == "choice":  # one expression: as rules, thousands of them are more than the parser looks at
        kind, source = "regex", "|".join(re.escape(choice) for choice in json.loads(source))
    if kind in ("grammar", "lark"):
        source = _JSON_RULE.sub(lambda rule: rule[1] + exact(rule[2]), source)
    return grammar_from("regex" if kind == "regex" else "grammar", source)


def exact(source: str) -> str:
    """A JSON schema whose every answer is valid, with this plugin's options. Raises ValueError for what cannot be held."""
    schema = close_objects(read_json_schema(source))
    for part in schemas_within(schema):
        check_counts(part)
    options = {**JSON_OPTIONS, **(schema.get("x-guidance") or {})}
    if _UNSPOKEN.search(json.dumps(schema)):
        for part in schemas_within(schema):
            if part.get("properties") and part.get("additionalProperties", True) is not False:
                raise ValueError("control characters in a schema need additionalProperties false beside properties")
        del options["json_allowed_escapes"]
    return json.dumps({**change_schemas(schema, exact_formats), "x-guidance": options}, ensure_ascii=False)


def _reason(error: str) -> str:
    """The library's message without its marks; one of them means that the grammar has no words."""
    text = error.replace("<non-verbose/>", "").strip()
    return "nothing follows it" if text == "NoExtensionBias" else text


def _object(source: str) -> dict[str, Any]:
    """A JSON text that must be an object."""
    try:
        value = json.loads(source)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("a structural tag is an object")
    return value


@hookimpl
def llmd_register_grammars() -> list[GrammarSpec]:
    """The default for every kind of constraint."""
    return [
        GrammarSpec(
            name="llguidance",
            summary="JSON schema, regex, choice, EBNF and Lark, structural tags (Rust, lazy automata)",
            kinds=("json", "json_object", "regex", "choice", "grammar", "lark", "structural_tag"),
            build=LlguidanceCompiler,
            order=10,
        )
    ]
