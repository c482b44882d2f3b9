"""Constraints are compiled once, off the loop, within bounds of size and time; what fails is the request's fault."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from llmd.config import LimitsConfig
from llmd.errors import InvalidRequest
from llmd.text.structured import Constraint, Grammars, select_compilers


class Compiler:
    """Counts, sleeps and refuses as told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.threads: set[str] = set()

    def compile(self, kind, source):
        self.calls.append(source)
        self.threads.add(threading.current_thread().name)
        if source == "slow":
            time.sleep(0.3)
        if source == "wrong":
            raise ValueError("no such rule")
        return (kind, source)


def grammars(compiler, *, kinds=("json", "regex"), first=(), **changes) -> Grammars:
    limits = LimitsConfig(**{"max_grammar_bytes": 100, "grammar_timeout_s": 5.0, "grammar_cache_size": 2, **changes})
    return Grammars([*first, (kinds, lambda: compiler)], limits)


async def test_equal_constraints_are_compiled_once_and_off_the_loop():
    import asyncio

    compiler = Compiler()
    service = grammars(compiler)
    found = await asyncio.gather(*(service.compile(Constraint("json", "a")) for _ in range(5)))
    assert [grammar.compiled for grammar in found] == [("json", "a")] * 5
    assert (await service.compile(Constraint("regex", "a"))).compiled == ("regex", "a")
    assert compiler.calls == ["a", "a"]
    assert all(name.startswith("llmd-grammar") for name in compiler.threads)
    service.close()


async def test_the_cache_keeps_what_was_used_last():
    compiler = Compiler()
    service = grammars(compiler)
    for source in ("a", "b", "a", "c", "a", "b"):
        await service.compile(Constraint("json", source))
    assert compiler.calls == ["a", "b", "c", "b"]
    service.close()


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json", "x" * 101, "larger than 100 bytes"),
        ("json", "wrong", "cannot be used: no such rule"),
        ("json", "slow", "took longer than 0.05 s"),
        ("choice", "a", "no loaded grammar plugin takes 'choice'"),
    ],
)
async def test_what_cannot_be_used_is_an_invalid_request(kind, source, message):
    service = grammars(Compiler(), grammar_timeout_s=0.05)
    with pytest.raises(InvalidRequest, match=message) as refused:
        await service.compile(Constraint(kind, source, param="response_format"))
    assert refused.value.param == "response_format"
    service.close()


async def test_what_is_wrong_is_found_out_once():
    compiler = Compiler()
    service = grammars(compiler)
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            await service.compile(Constraint("json", "wrong"))
    assert len(compiler.calls) == 1
    service.close()


async def test_a_missing_library_leaves_it_to_the_next_plugin_and_a_refusal_does_not():
    def missing():
        raise ImportError("No module named 'fast'")

    other = Compiler()
    service = grammars(other, first=[(("json",), missing)])
    assert (await service.compile(Constraint("json", "a"))).compiled == ("json", "a")
    strict = Compiler()
    service = grammars(other, first=[(("json",), lambda: strict)])
    with pytest.raises(InvalidRequest, match="no such rule"):
        await service.compile(Constraint("json", "wrong"))
    assert other.calls == ["a"]
    service.close()


def test_a_named_backend_comes_first_and_others_take_what_it_does_not():
    specs = {
        "wide": SimpleNamespace(kinds=("json", "lark"), order=1, build=lambda context: "wide"),
        "named": SimpleNamespace(kinds=("json", "regex"), order=2, build=lambda context: "named"),
    }
    chosen = select_compilers(specs, "named", None)
    assert [(kinds, build()) for kinds, build in chosen] == [(("json", "regex"), "named"), (("lark",), "wide")]
    assert [kinds for kinds, _ in select_compilers(specs, "auto", None)] == [("json", "lark"), ("json", "regex")]
