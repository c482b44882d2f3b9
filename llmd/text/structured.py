"""Structured output: what a request constrains its answer to, compiled off the loop, cached and shared."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from llmd.config import LimitsConfig
from llmd.engine.grammar import CompiledGrammar, GuardedGrammar
from llmd.engine.params import StructuredOutputsParams
from llmd.errors import InvalidRequest

ConstraintKind = Literal["json", "json_object", "regex", "choice", "grammar", "lark", "structural_tag"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the output must follow.

    `source` is text, equal for equal constraints: a JSON schema, nothing (json_object), a regular expression, a JSON list
    of strings (choice), a grammar (EBNF or Lark), or a structural tag as JSON. Our own grammars are of
    kind "lark": a backend for what clients write need not know that.
    """

    kind: ConstraintKind
    source: str
    param: str = "structured_outputs"  # the request's field, for errors


def constraint_of(params: StructuredOutputsParams, param: str = "structured_outputs") -> Constraint:
    """The constraint that a request's params ask for, in its one form."""
    if params.json is not None:
        schema = params.json
        return Constraint("json", schema if isinstance(schema, str) else _dump(schema), param)
    if params.choice is not None:
        return Constraint("choice", _dump(list(params.choice)), param)
    for kind in ("regex", "grammar", "structural_tag"):
        if (source := getattr(params, kind)) is not None:
            return Constraint(kind, source, param)
    return Constraint("json_object", "", param)


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the schema is not JSON: {error}", param="structured_outputs") from error


@dataclass(frozen=True, slots=True)
class GrammarContext:
    """What a grammar plugin needs to know of a model."""

    vocab_size: int  # width of the logits
    eos_token_ids: tuple[int, ...]
    special_token_ids: frozenset[int]
    token_bytes: Callable[[int], bytes]
    encode: Callable[[str], list[int]]
    tokenizer_json: Callable[[], str | None]  # tokenizer.json's text where the model has one


class GrammarCompiler(Protocol):
    """Compiles for one model; called on a pool thread."""

    def compile(self, kind: ConstraintKind, source: str) -> CompiledGrammar:
        """Compile; raises ValueError with the reason when that cannot be done."""


class Grammars:
    """A model's compiled constraints.

    `compilers` are tried in their order among those that take the constraint's kind; they are built when first wanted.
    """

    def __init__(
        self,
        compilers: Sequence[tuple[tuple[str, ...], Callable[[], GrammarCompiler]]],
        limits: LimitsConfig,
    ) -> None:
        self._factories = compilers
        self._built: dict[int, GrammarCompiler] = {}
        self.set_limits(limits)
        self._cache: OrderedDict[tuple[str, str], asyncio.Future[CompiledGrammar]] = OrderedDict()
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="llmd-grammar")

    def set_limits(self, limits: LimitsConfig) -> None:
        """Bounds for what is compiled from now on."""
        self._max_source_bytes, self._timeout_s = limits.max_grammar_bytes, limits.grammar_timeout_s
        self._cache_size = limits.grammar_cache_size

    async def compile(self, constraint: Constraint) -> CompiledGrammar:
        """The compiled constraint; raises InvalidRequest for one that is too large, too slow or wrong."""
        if len(constraint.source.encode(errors="surrogatepass")) > self._max_source_bytes:
            raise InvalidRequest(
                f"{constraint.param} is larger than {self._max_source_bytes} bytes (limits.max_grammar_bytes)",
                param=constraint.param,
            )
        key = (constraint.kind, constraint.source)
        pending = self._cache.get(key) or self._begin(key, constraint)
        self._cache.move_to_end(key)
        try:
            return await asyncio.wait_for(asyncio.shield(pending), self._timeout_s)
        except TimeoutError:
            reason = f"took longer than {self._timeout_s:g} s to compile (limits.grammar_timeout_s)"
            self._cache.pop(key, None)
        except ValueError as error:  # it stays there: the same again is refused at once
            reason = f"cannot be used: {error}"
            error.__traceback__ = None  # which would grow with every time it is raised
        raise InvalidRequest(f"{constraint.param} {reason}"[:2000], param=constraint.param) from None

    def _begin(self, key: tuple[str, str], constraint: Constraint) -> asyncio.Future[CompiledGrammar]:
        pending = asyncio.get_running_loop().run_in_executor(self._pool, self._compile, constraint)
        pending.add_done_callback(_retrieve)
        self._cache[key] = pending
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return pending

    def _compile(self, constraint: Constraint) -> CompiledGrammar:
        """On a pool thread, by the first compiler that is there. What it refuses no other may take more loosely."""
        reasons = []
        for index, (kinds, build) in enumerate(self._factories):
            if constraint.kind not in kinds:
                continue
            try:
                compiler = self._built.get(index) or self._built.setdefault(index, build())
            except ImportError as error:  # an optional library: the next plugin may have its own
                reasons.append(str(error))
                continue
            return GuardedGrammar(compiler.compile(constraint.kind, constraint.source))
        raise ValueError(reasons[0] if reasons else f"no loaded grammar plugin takes {constraint.kind!r}")

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _retrieve(pending: asyncio.Future[CompiledGrammar]) -> None:
    """Look at the outcome, so that one nobody waits for any more (a time-out came first) is no warning."""
    if not pending.cancelled():
        pending.exception()


def select_compilers(
    specs: Mapping[str, object], backend: str, context: GrammarContext
) -> list[tuple[tuple[str, ...], Callable[[], GrammarCompiler]]]:
    """The compilers of grammar specs by their `order`; a named one comes first, others get kinds that it does not take."""
    known: Mapping[str, Any] = specs
    chosen = sorted(known.items(), key=lambda entry: (entry[0] != backend, entry[1].order))
    taken = frozenset(known[backend].kinds) if backend in known else frozenset()
    kinds = [(tuple(kind for kind in spec.kinds if name == backend or kind not in taken), spec) for name, spec in chosen]
    return [(names, partial(spec.build, context)) for names, spec in kinds]
