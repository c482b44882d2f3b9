"""What checkpoints say about their quantization, read with its types checked; and which modules their lists name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from llmd.api.v1 import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmd.api.v1 import Linear, QuantMethod

S = TypeVar("S")  # how a linear is stored

_MAX_PATTERN = 1000


class Settings:
    """config.json's quantization_config, or a table within it. Every reader raises ModelError naming the key."""

    def __init__(self, raw: Mapping[str, Any], path: str = "quantization_config") -> None:
        self.raw, self.path = raw, path

    @property
    def kind(self) -> str:
        """quant_method in small letters, or nothing."""
        return str(self.raw.get("quant_method", "")).lower()

    def integer(self, *keys: str, default: int | None = None, allowed: Iterable[int] = ()) -> int:
        """A whole number under the first of `keys` that is there."""
        key, value = self._find(keys, default)
        if not isinstance(value, int) or isinstance(value, bool) or (allowed and value not in allowed):
            raise self.wrong(key, value, " or ".join(map(str, allowed)) or "a whole number")
        return value

    def group_size(self, *keys: str, default: int | None = None) -> int | None:
        """Input features that share a scale; None, written -1, for all."""
        key, value = self._find(keys, default)
        if value is None or value == -1:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 20:
            raise self.wrong(key, value, "-1 or a whole number above 0")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """true or false."""
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def choice(self, *keys: str, allowed: Iterable[str], default: str) -> str:
        """One of some words, in small letters."""
        key, value = self._find(keys, default)
        if not isinstance(value, str) or value.lower() not in allowed:
            raise self.wrong(key, value, " or ".join(map(repr, allowed)))
        return value.lower()

    def names(self, *keys: str) -> tuple[str, ...]:
        """A list of module names or patterns, which may be nested by block; none where no key is there."""
        key, value = self._find(keys, [])
        flat: list[Any] = [None]
        if isinstance(value, list | tuple):
            flat = [name for item in value for name in (item if isinstance(item, list) else [item])]
        if not all(isinstance(name, str) and len(name) <= _MAX_PATTERN for name in flat):
            raise self.wrong(key, value, "a list of module names")
        return tuple(flat)

    def table(self, key: str) -> Settings:
        """A table within."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, value, "an object")
        return Settings(value or {}, f"{self.path}.{key}")

    def refuse(self, key: str, why: str) -> None:
        """Raise where a key asks for what is not served."""
        if self.raw.get(key):
            raise ModelError(f"{self.path}.{key} is {self.raw[key]!r}: {why}")

    def wrong(self, key: str, value: object, allowed: str) -> ModelError:
        """The error for a value that cannot be."""
        return ModelError(f"{self.path}.{key} must be {allowed}, got {value!r}")

    def _find(self, keys: tuple[str, ...], default: object) -> tuple[str, Any]:
        key = next((key for key in keys if self.raw.get(key) is not None), keys[0])
        value = self.raw.get(key)
        return key, default if value is None else value


def is_among(name: str, patterns: Iterable[str]) -> bool:
    """Whether a list of skipped modules means this one: by whole words of its dotted name, or by a regex from its start."""
    words = [pattern.removeprefix("re:") for pattern in patterns]
    return any(f".{word.strip('.')}." in f".{name}." or matches(rf"(?:{word})(?:\.|$)", name) for word in words)


def matches(pattern: str, name: str) -> bool:
    """`re.match`; what is no regex matches nothing."""
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return False


def by_parts(
    layer: Linear, choose: Callable[[str], S | None], build: Callable[[S], QuantMethod], *, apart: bool = False
) -> QuantMethod | None:
    """One method for a linear whose parts are all stored alike, else one for each; None for what is not quantized."""
    schemes = [choose(name) for name in layer.checkpoint_names]
    if len(set(schemes)) == 1 and not (apart and schemes[0] is not None and len(schemes) > 1):
        return None if schemes[0] is None else build(schemes[0])
    from llmd.api.v1 import PartMethods

    return PartMethods([None if scheme is None else build(scheme) for scheme in schemes])
