"""`import torch` in two thirds of the time: what only compilers and tracers need waits until one of them is imported.

A quarter of the import is `torch._meta_registrations`, with it the decompositions of a thousand operators: what they would
do to tensors without memory, which nobody asks who runs operators. (Most of what can be built on the meta device needs none
of it; where it does, `finish_import` brings it.) The garbage collector takes a tenth, walking again and again through
objects that all stay. Both ratios were measured with torch 2.13 on a CPU; other releases are imported as they are.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType

_KNOWN_RELEASE = "2.13."  # in which nothing else of the import needs what is postponed
_POSTPONED = "torch._meta_registrations"
_NEEDED_BY = ("torch._dynamo", "torch._inductor", "torch.onnx", "transformers", "accelerate")


class _Waiting:
    """A finder that finds nothing: it only sees the first import of a module that needs what was postponed."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in _NEEDED_BY:
            finish_import()
        return None


_waiting = _Waiting()


def import_torch() -> None:
    """Import torch, unless that has been done."""
    if "torch" in sys.modules or not metadata.version("torch").startswith(_KNOWN_RELEASE):
        return
    sys.modules[_POSTPONED] = ModuleType(_POSTPONED)
    try:
        with _without_collections():
            torch = importlib.import_module("torch")
    finally:
        del sys.modules[_POSTPONED]
    vars(torch).pop(_POSTPONED.rpartition(".")[2], None)
    if (set_metaclass := getattr(torch._C, "_set_generator_metaclass", None)) is not None:  # else there are no generators
        set_metaclass(importlib.import_module("torch._opaque_base").OpaqueBaseMeta)
    sys.meta_path.insert(0, _waiting)


def finish_import() -> bool:
    """Import what was postponed; whether there was anything."""
    if _waiting not in sys.meta_path:
        return False
    sys.meta_path.remove(_waiting)
    importlib.import_module(_POSTPONED)
    return True


@contextmanager
def _without_collections() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
