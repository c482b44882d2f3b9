"""Option types that vLLM's flags need and click has not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

_MANY = ("--goodput", "--header", "--metadata")


def spread(arguments: Sequence[str]) -> Iterator[str]:
    """`--goodput ttft:500 tpot:50` as click wants it: the option before each of its values."""
    option, num_values = "", 0
    for argument in arguments:
        if argument.startswith("-"):
            option, num_values = argument if argument in _MANY else "", 0
            yield argument
        else:
            if option and num_values:
                yield option
            num_values += 1
            yield argument


class ManyValuesCommand(click.Command):
    """A command some of whose options take several values after one flag."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(spread(args)))


class PositiveOrInf(click.ParamType):
    """A rate: a number above 0, or inf."""

    name = "number|inf"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not number > 0:
            self.fail(f"must be a number above 0 or inf, got {value!r}", param, ctx)
        return number


class NameList(click.ParamType):
    """Names of a known set, separated by commas."""

    name = "names"

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in value.split(",") if name.strip())
        if unknown := [name for name in names if name not in self.known]:
            self.fail(f"{unknown[0]!r} is none of {', '.join(self.known)}", param, ctx)
        return names


class NumberList(click.ParamType):
    """Percentiles, separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(",") if part.strip())
        except ValueError:
            numbers = (math.nan,)
        if not all(0 <= number <= 100 for number in numbers):
            self.fail(f"must be numbers between 0 and 100 separated by commas, got {value!r}", param, ctx)
        return numbers


class JsonObject(click.ParamType):
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        try:
            found = json.loads(value)
        except json.JSONDecodeError as error:
            self.fail(f"is not JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail("must be a JSON object", param, ctx)
        return found


def pairs(values: Sequence[str], separators: str = "=:") -> dict[str, str]:
    """KEY=VALUE (or KEY: VALUE) as a dict; raises BadParameter that shows the pair."""
    found = {}
    for value in values:
        at = min((value.index(s) for s in separators if s in value), default=0)
        if at <= 0:
            raise click.BadParameter(f"expected KEY=VALUE, got {value!r}")
        found[value[:at].strip()] = value[at + 1 :].strip()
    return found


def stacked(options: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Several click options as one decorator, shown in their order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


RANDOM_OPTIONS = stacked(
    [
        click.option("--random-input-len", type=click.IntRange(1), default=1024, show_default=True, help="Mean length."),
        click.option("--random-output-len", type=click.IntRange(1), default=128, show_default=True, help="Mean length."),
        click.option(
            "--random-range-ratio",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.0,
            show_default=True,
            help="Lengths are drawn evenly from the mean x (1 - ratio) to the mean x (1 + ratio).",
        ),
        click.option(
            "--random-prefix-len",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="Tokens of a prefix that all prompts share, before their own: shows what prefix caching brings.",
        ),
    ]
)
