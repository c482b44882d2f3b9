"""The public surface, name by name, against the committed listing: a change of it is a visible diff.

After a wanted change: `python tests/test_api_surface.py` writes the listing anew; say in CHANGELOG.md what changed.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LISTING = Path(__file__).parent / "api_surface.txt"
MODULES = ("llmd.api.v1", "llmd.api.v1.testing")


def surface() -> Iterator[str]:
    """One line for each public name, and for each field and method below it."""
    for module_name in MODULES:
        module = __import__(module_name, fromlist=["__all__"])
        yield f"# {module_name}"
        for name in sorted(module.__all__):
            yield from described(name, getattr(module, name))


def described(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        yield f"class {name}({bases})" if bases else f"class {name}"
        yield from sorted(f"    {line}" for line in members(value))
    elif callable(value) and hasattr(value, "__name__"):
        yield f"def {name}{signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def signature(value: Any) -> str:
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        return "(…)"
    return re.sub(r" at 0x[0-9a-f]+", "", re.sub(r"<(function|class) ([^>]*)>", r"\2", text)).replace("'", "")


def members(cls: type) -> Iterator[str]:
    """What the class itself adds, private names and inherited ones aside."""
    if issubclass(cls, enum.Enum):
        yield from (f"{member.name} = {member.value!r}" for member in cls)
        return
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            yield f"{field.name}: {shown(field.type)}{' = …' if has_default else ''}"
    elif "model_fields" in dir(cls):
        for name, field in cls.model_fields.items():
            yield f"{name}{'' if field.is_required() else ' = …'}"
    else:
        names = inspect.get_annotations(cls)
        defaults = getattr(cls, "_field_defaults", {})
        yield from (
            f"{name}: {shown(kind)}{' = …' if name in defaults else ''}"
            for name, kind in names.items()
            if not name.startswith("_")
        )
    for name, value in vars(cls).items():
        if name == "__init__" and not dataclasses.is_dataclass(cls) and not hasattr(cls, "_is_protocol"):
            yield f"def __init__{signature(value)}"
        elif name.startswith("_"):
            continue
        elif isinstance(value, property):
            yield f"property {name}"
        elif inspect.isfunction(value):
            yield f"{'async ' if inspect.iscoroutinefunction(value) else ''}def {name}{signature(value)}"
        elif isinstance(value, classmethod | staticmethod):
            yield f"{type(value).__name__} {name}{signature(value.__func__)}"


def shown(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__forward_arg__", getattr(kind, "__name__", str(kind)))


def public() -> Iterator[tuple[str, Any]]:
    for module_name in MODULES:
        module = __import__(module_name, fromlist=["__all__"])
        yield from ((f"{module_name}.{name}", getattr(module, name)) for name in module.__all__)


def test_surface_is_as_listed():
    found, listed = list(surface()), LISTING.read_text(encoding="utf-8").splitlines()
    diff = "\n".join(difflib.unified_diff(listed, found, "listed", "found", lineterm="", n=0))
    assert not diff, f"the public surface changed; if that is meant: python tests/test_api_surface.py\n{diff}"


def test_every_name_is_documented():
    objects = [(name, value) for name, value in public() if inspect.isclass(value) or inspect.isfunction(value)]
    assert not [name for name, value in objects if not inspect.getdoc(value)]


@pytest.mark.parametrize("module", MODULES)
def test_typed_names_are_the_lazy_names(module):
    """What type checkers see and what is loaded when asked for."""
    found = __import__(module, fromlist=["_HOME_OF"])
    typed = re.findall(r"^    from (\S+) import (\w+) as \2$", Path(found.__file__).read_text(), re.MULTILINE)
    assert {name: home for home, name in typed} == found._HOME_OF


def test_hidden_parts_of_the_kit_are_few():
    """The kit may not grow names that nothing documents."""
    from llmd.api.v1 import testing

    folder = Path(testing.__file__).parent
    homes = {home.rpartition(".")[2] for home in testing._HOME_OF.values()}
    assert {file.stem for file in folder.glob("*.py")} - homes == {"__init__", "compare"}


if __name__ == "__main__":
    LISTING.write_text("\n".join(surface()) + "\n", encoding="utf-8")
    print(f"{LISTING}: {len(LISTING.read_text().splitlines())} lines")
