"""Adapter formats: what they find, what they load, what they refuse."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from llmd.api.v1 import AdapterError, AdapterFormat, BaseModule
from llmd.api.v1.testing.compare import require


def check_adapter_format(
    adapter_format: AdapterFormat, folder: Path, modules: Mapping[str, BaseModule], *, rank: int
) -> None:
    """`folder` holds an adapter of this format, of `rank`, for the base's `modules`.

    It is found there and not in an empty folder; `check` and `load` take it, shapes fit the modules; both raise
    AdapterError where max_rank is less than its rank or the base lacks its modules.
    """
    with tempfile.TemporaryDirectory() as empty:
        require(not adapter_format.detect(Path(empty)), "an empty folder is taken for an adapter")
    require(adapter_format.detect(folder), "detect does not find the adapter")
    adapter_format.check(folder, modules, rank)
    adapter_format.check(folder, None, rank)
    adapter = adapter_format.load(folder, modules, rank)
    require(adapter.rank == rank, f"the adapter has rank {adapter.rank}; expected: {rank}")
    require(bool(adapter.modules), "the adapter changes no module")
    for name, pair in adapter.modules.items():
        require(name in modules, f"{name!r} is no module of the base")
        base = modules[name]
        wanted = ((pair.rank, base.in_features), (base.out_features, pair.rank))
        found = (tuple(pair.a.shape), tuple(pair.b.shape))
        require(found == wanted, f"{name}: a and b have shapes {found}; expected: {wanted}")
    _check_refused(adapter_format, folder, modules, rank - 1, "max_rank is less than its rank")
    _check_refused(adapter_format, folder, {"other": BaseModule("linear", 1, 1)}, rank, "the base lacks its modules")


def _check_refused(
    adapter_format: AdapterFormat, folder: Path, modules: Mapping[str, BaseModule], max_rank: int, why: str
) -> None:
    for call in (adapter_format.check, adapter_format.load):
        try:
            call(folder, modules, max_rank)
        except AdapterError:
            continue
        raise AssertionError(f"{call.__name__} raises nothing though {why}; expected: AdapterError")
