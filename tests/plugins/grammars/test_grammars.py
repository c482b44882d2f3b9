"""Both grammar plugins allow what they should, force what they can, end, and refuse what is wrong."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import jsonschema
import pytest
from walks import allowed, grammar_context

import llmd_plugins.sources.demo
from llmd.text.tokenizer import Tokenizer
from llmd_plugins.grammars import llguidance, xgrammar

FOLDER = Path(llmd_plugins.sources.demo.__file__).parent / "model"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-zé]{1,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(FOLDER)


@pytest.fixture(scope="module", params=[llguidance, xgrammar], ids=["llguidance", "xgrammar"])
def compiler(request, tokenizer):
    [spec] = request.param.llmd_register_grammars()
    return spec.build(grammar_context(tokenizer))


def walk(grammar, tokenizer: Tokenizer, seed: int, limit: int = 400) -> str:
    """A random walk through a grammar, ended where it may end."""
    chance, matcher, ids = random.Random(seed), grammar.matcher(), []
    while not matcher.finished and len(ids) < limit:
        choices = allowed(matcher, tokenizer.vocab_size)
        assert choices, "a dead end"
        if tokenizer.eos_token_id in choices:
            return tokenizer.decode(ids)
        ids.append(chance.choice(choices))
        assert matcher.accept(ids[-1:])
        if forced := matcher.forced():
            assert matcher.accept(forced)
            ids += forced
    assert matcher.finished, "no end in sight"
    return tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(4))
def test_json_follows_its_schema(compiler, tokenizer, seed):
    text = walk(compiler.compile("json", json.dumps(PERSON)), tokenizer, seed)
    jsonschema.validate(json.loads(text), PERSON)


def test_regex_choice_and_grammar_end_in_what_they_describe(compiler, tokenizer):
    for seed in range(4):
        assert re.fullmatch("[a-c]{3}x+y", walk(compiler.compile("regex", "[a-c]{3}x+y"), tokenizer, seed))
        assert walk(compiler.compile("choice", json.dumps(["yes", "no", 'a "quote"'])), tokenizer, seed) in (
            "yes",
            "no",
            'a "quote"',
        )
        assert walk(compiler.compile("grammar", 'root ::= "a" ("b" | "c") "d"'), tokenizer, seed) in ("abd", "acd")


def test_whitespace_in_json_comes_to_an_end(compiler, tokenizer):
    for blank in (" ", "\n", "\t"):
        matcher = compiler.compile("json", json.dumps(PERSON)).matcher()
        assert matcher.accept(tokenizer.encode("{", add_special_tokens=False))
        [token_id] = tokenizer.encode(blank, add_special_tokens=False)
        assert sum(matcher.accept([token_id]) for _ in range(60)) < 40


def test_matchers_of_one_grammar_do_not_meet(compiler, tokenizer):
    grammar = compiler.compile("choice", '["left", "right"]')
    first, second = grammar.matcher(), grammar.matcher()
    assert first.accept(tokenizer.encode("left", add_special_tokens=False))
    assert second.accept(tokenizer.encode("right", add_special_tokens=False))


@pytest.mark.parametrize(
    ("kind", "source"),
    [("json", '{"type": "strin"}'), ("json", "[1"), ("regex", "(a"), ("grammar", 'root ::= "a" other')],
)
def test_what_cannot_compile_is_refused_with_a_reason(compiler, kind, source):
    with pytest.raises(ValueError, match=r"\w"):
        compiler.compile(kind, source)


def test_forced_tokens_leave_no_choice(tokenizer):
    [spec] = llguidance.llmd_register_grammars()
    matcher = spec.build(grammar_context(tokenizer)).compile("choice", '["the only way"]').matcher()
    forced = matcher.forced()
    assert tokenizer.decode(forced).startswith("the only")
    for token_id in forced:
        assert allowed(matcher, tokenizer.vocab_size) == [token_id]
        assert matcher.accept([token_id])


def test_a_tokenizer_without_tokenizer_json_serves_too(tokenizer):
    [spec] = llguidance.llmd_register_grammars()
    grammar = spec.build(grammar_context(tokenizer, with_json=False)).compile("choice", '["yes", "no"]')
    assert walk(grammar, tokenizer, 1) in ("yes", "no")


def test_structural_tags_constrain_only_what_they_open(tokenizer):
    [spec] = llguidance.llmd_register_grammars()
    tag = {"structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}], "triggers": ["<f"]}
    matcher = spec.build(grammar_context(tokenizer)).compile("structural_tag", json.dumps(tag)).matcher()
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    assert matcher.accept(encode("free text "))
    assert matcher.accept(encode("<f>"))
    assert not matcher.accept(encode("x"))
    with pytest.raises(ValueError, match="no trigger begins"):
        spec.build(grammar_context(tokenizer)).compile("structural_tag", json.dumps({**tag, "triggers": ["<g"]}))
