"""The jinja2 sandbox that chat templates run in: what transformers offers them, with the usual ways of building endless
values bounded. A template cannot reach out of it; for its appetite it is trusted as far as its model is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_RANGE = 100_000  # items of one range()
MAX_RANGE_TOTAL = 1_000_000  # items of all range() calls of one rendering
MAX_VALUE_LENGTH = 16 << 20  # characters or items of one string or list made by an operator
MAX_EXPONENT = 64


class _GenerationTag(Extension):
    """{% generation %} marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The body in place of the tag."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` without underscored names, which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Environment(ImmutableSandboxedEnvironment):
    """Operators that could build endless values are checked before they are applied."""

    intercepted_binops = frozenset(["*", "**", "+"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply `operator`. Raises OverflowError for results out of bounds."""
        if operator == "**":
            _bound(_exponent(left, right), MAX_EXPONENT, "the result of **")
        else:
            _bound(_length_of(operator, left, right), MAX_VALUE_LENGTH, f"the result of {operator}")
        return super().call_binop(context, operator, left, right)


class RangeBudget:
    """`range` for one rendering: each call and all calls together are bounded, and with them its loops."""

    def __init__(self) -> None:
        self._num_left = MAX_RANGE_TOTAL

    def __call__(self, *args: int) -> range:
        items = range(*args)
        _bound(len(items), MAX_RANGE, "range()")
        self._num_left -= len(items)
        _bound(MAX_RANGE_TOTAL - self._num_left, MAX_RANGE_TOTAL, "range() over the whole template")
        return items


def make_environment() -> jinja2.Environment:
    """The environment of all chat templates."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def bounded(pieces: Iterator[str], max_bytes: int) -> str:
    """The pieces joined. Raises OverflowError as soon as they are too many."""
    kept, num_bytes = [], 0
    for piece in pieces:
        num_bytes += len(piece) if piece.isascii() else len(piece.encode(errors="surrogatepass"))
        _bound(num_bytes, max_bytes, "the rendered template", "bytes")
        kept.append(piece)
    return "".join(kept)


def loops_over_content(source: str, environment: jinja2.Environment) -> bool:
    """Whether a template walks through a message's content as a list of parts."""
    tree = environment.parse(source)
    names = {
        assign.target.name
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, frozenset())
    }
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, names: set[str] | frozenset[str]) -> bool:
    while isinstance(node, nodes.Filter | nodes.Getitem) and isinstance(node.node, nodes.Node):
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content":
            return True
        node = node.node
    return (isinstance(node, nodes.Getattr) and node.attr == "content") or (
        isinstance(node, nodes.Name) and node.name in names
    )


def _bound(value: int, limit: int, what: str, unit: str = "items") -> None:
    if value > limit:
        raise OverflowError(f"{what} has more than {limit} {unit}")


def _length_of(operator: str, left: Any, right: Any) -> int:
    """How long a string or list the operator would make."""
    if operator == "+":
        return len(left) + len(right) if isinstance(left, Sequence) and isinstance(right, Sequence) else 0
    for many, times in ((left, right), (right, left)):
        if isinstance(many, Sequence) and isinstance(times, int):
            return len(many) * times
    return 0


def _exponent(left: Any, right: Any) -> int:
    return right if isinstance(right, int) and isinstance(left, int) else 0


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold names that begin with an underscore ({name!r})")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: no HTML escapes, non-ASCII as it is."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def plain(value: Any) -> Any:
    """A copy in plain JSON types: a template never meets an object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    dump = getattr(value, "model_dump", None)
    return plain(dump()) if callable(dump) else f"<{type(value).__name__}>"


def text_of_parts(parts: Sequence[Any]) -> str | None:
    """Content parts that are all text as one string; None when there is something else among them."""
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    strings = [text for text in texts if isinstance(text, str)]
    return "\n".join(strings) if len(strings) == len(parts) else None
