"""The decision tables that can be tuned: their entries, what to try for each, and the call that is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.gpu import attention_kernels, tables
from benchmarks.gpu.setting import Setting, median_ms

_ROWS = (16, 64, 2048)  # of x, for each entry of a table by rows
_DEPTH, _WIDTH = 4096, 4096


class Target(Protocol):
    """One table."""

    name: str
    path: Path
    assigned: str  # what the table is called in its file

    def entries(self) -> dict[Any, Any]:
        """The present tile of each entry."""

    def candidates(self, key: Any, present: Any) -> list[Any]:
        """Tiles to try."""

    def time(self, key: Any, tile: Any) -> float:
        """Milliseconds of a call with this tile."""

    def set(self, key: Any, tile: Any) -> None:
        """Take a tile."""

    def lines(self) -> list[str]:
        """The table as it now stands."""

    def write(self) -> None:
        """Into its file."""


def _setting() -> Setting:
    return Setting(torch.device("cuda"), False, "", Path(), {})


class Attention:
    """paged_attention/table.py: decode and prefill by head dim, for the device at hand."""

    name, assigned = "paged_attention", "_TABLE"

    def __init__(self, device: str | None = None) -> None:
        from llmd_kernels.paged_attention import table

        self.path, self._module = Path(table.__file__), table
        self._device = device or _device_name()
        self._table = {name: {dim: list(pair) for dim, pair in dims.items()} for name, dims in table._TABLE.items()}
        if self._device not in self._table:
            default = self._table["gfx942" if self._device.startswith("gfx") else table._DEFAULT]
            self._table[self._device] = {dim: list(pair) for dim, pair in default.items()}

    def entries(self) -> dict[Any, Any]:
        return {(dim, at): tile for dim, pair in self._table[self._device].items() for at, tile in enumerate(pair)}

    def candidates(self, key: Any, present: Any) -> list[Any]:
        queries = (64, 128) if key[1] else (16,)
        sizes: Iterable[tuple[int, ...]] = product(queries, (32, 64, 128), (4, 8), (1, 2, 3))
        return [type(present)(*size) for size in sizes]

    def time(self, key: Any, tile: Any) -> float:
        from llmd_kernels.paged_attention import paged_attention

        dim, is_prefill = key
        heads, setting = (32, 8, dim), _setting()
        call = attention_kernels.call(setting.device, heads, *((1, 8192, 8192) if is_prefill else (64, 2048, 1)))
        given = self._module.tiles
        self._module.tiles = lambda device, head_dim, *, is_prefill: tile
        try:
            return median_ms(setting, lambda: paged_attention(call))
        finally:
            self._module.tiles = given

    def set(self, key: Any, tile: Any) -> None:
        dim, at = key
        self._table[self._device][dim][at] = tile

    def lines(self) -> list[str]:
        return tables.by_device(self._table)

    def write(self) -> None:
        tables.write(self.path, self.assigned, self.lines())


class Linear:
    """The tiles.py of a quantized linear, by rows of x."""

    assigned = "_BY_ROWS"

    def __init__(self, name: str, call: Callable[[torch.Tensor], Callable[[], Any]]) -> None:
        self.name, self._call = name, call
        self._tiles = import_module(f"llmd_kernels.{name}.tiles")
        self.path = Path(str(self._tiles.__file__))
        self._entries: dict[int, Any] = dict(self._tiles._BY_ROWS)

    def entries(self) -> dict[Any, Any]:
        return dict(self._entries)

    def candidates(self, key: Any, present: Any) -> list[Any]:
        found = []
        for block_m, block_n, warps, stages in product((16, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
            if block_m <= max(16, key):
                found.append(present._replace(block_m=block_m, block_n=block_n, warps=warps, stages=stages))
        return found

    def time(self, key: Any, tile: Any) -> float:
        setting = _setting()
        rows = next(rows for rows in _ROWS if rows >= min(key, _ROWS[-1]))
        x = torch.randn(rows, _DEPTH, device=setting.device).bfloat16()
        kernels = import_module(f"llmd_kernels.{self.name}.triton")
        given = kernels.tile_for
        kernels.tile_for = lambda *shape: tile  # type: ignore[attr-defined]
        try:
            return median_ms(setting, self._call(x))
        finally:
            kernels.tile_for = given  # type: ignore[attr-defined]

    def set(self, key: Any, tile: Any) -> None:
        self._entries[key] = tile

    def lines(self) -> list[str]:
        return tables.by_rows(list(self._entries.items()))

    def write(self) -> None:
        tables.write(self.path, self.assigned, self.lines())


def _fp8(x: torch.Tensor) -> Callable[[], Any]:
    from llmd_kernels.fp8_linear import fp8_linear

    weight = torch.randn(_WIDTH, _DEPTH, device=x.device).to(torch.float8_e4m3fn)
    scale = torch.ones(_WIDTH, device=x.device)
    return lambda: fp8_linear(x, weight, scale)


def _int8(x: torch.Tensor) -> Callable[[], Any]:
    from llmd_kernels.int8_linear import triton

    weight = torch.randint(-127, 128, (_WIDTH, _DEPTH), dtype=torch.int8, device=x.device)
    sums, scale = weight.sum(1, dtype=torch.int32), torch.ones(_WIDTH, device=x.device)
    return lambda: triton.int8_linear(x, weight, scale, sums, None, None, 0)


def _device_name() -> str:
    from llmd_kernels.paged_attention.triton import device_name

    return device_name(torch.device("cuda")) if torch.cuda.is_available() else "sm_90"


TARGETS: dict[str, Callable[[], Target]] = {
    "paged_attention": Attention,
    "fp8_linear": partial(Linear, "fp8_linear", _fp8),
    "int8_linear": partial(Linear, "int8_linear", _int8),
}
