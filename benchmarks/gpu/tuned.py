"""The decision tables that can be tuned: their entries, what to try beside each, and the call that is timed.

A table's tiles are searched from the present one by changing a field at a time, so what is tried hangs on what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.gpu import attention_kernels, sampling_kernels, tables
from benchmarks.gpu.linear_kernels import FewRows
from benchmarks.gpu.lora_kernels import MAKE as LORAS
from benchmarks.gpu.setting import Setting, median_ms
from benchmarks.gpu.shapes import shape

_FOR_EVER = 1 << 62
_MOST_ROWS = 2048  # of x, for the last entry of a table by rows
_TOKENS = {16: 32, 32: 128, 64: 256, _FOR_EVER: 4096}  # of which the busiest expert gets so many pairs
_DEPTH, _WIDTH = 4096, 4096
_EXPERTS = (128, 8, 2048, 768)  # experts, of which so many for a token, hidden size, inner size
_MODEL = "qwen2.5-7b"

Fields = Mapping[str, Sequence[int]]  # what may stand in each field of a tile


class Target(Protocol):
    """One table."""

    name: str
    path: Path
    assigned: str  # what the table is called in its file

    def entries(self) -> dict[Any, Any]:
        """The present tile of each entry, the most valuable first."""

    def candidates(self, key: Any, present: Any) -> list[Any]:
        """Tiles to try beside one."""

    def time(self, key: Any, tile: Any) -> float:
        """Milliseconds of a call with this tile."""

    def set(self, key: Any, tile: Any) -> None:
        """Take a tile."""

    def lines(self) -> list[str]:
        """The table as it now stands."""

    def write(self) -> None:
        """Into its file."""


def neighbours(present: Any, fields: Fields) -> list[Any]:
    """All tiles that differ from this one in a single field."""
    return [
        present._replace(**{name: value})
        for name, values in fields.items()
        if name in present._fields
        for value in values
        if value != getattr(present, name)
    ]


def _setting() -> Setting:
    return Setting(torch.device("cuda"), False, _MODEL, Path(), {})


@contextmanager
def _instead(module: Any, name: str, value: Any) -> Iterator[None]:
    given = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, given)


class Attention:
    """paged_attention/table.py: decode and prefill by head dim, for the device at hand."""

    name, assigned = "paged_attention", "_TABLE"
    _ORDER = ((128, 0), (128, 1), (64, 0), (64, 1))
    _DECODE: Fields = {
        "block_n": (32, 64, 128, 256), "num_warps": (1, 2, 4, 8), "num_stages": (2, 3, 4, 5, 6), "programs": (1, 2, 3, 4, 6),
    }  # fmt: skip
    _PREFILL: Fields = {
        "block_m": (64, 128, 256), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5),
    }  # fmt: skip

    def __init__(self, device: str | None = None) -> None:
        from llmd_kernels.paged_attention import table

        self.path, self._module = Path(table.__file__), table
        self._device = device or _device_name()
        self._table = {name: {dim: list(pair) for dim, pair in dims.items()} for name, dims in table._TABLE.items()}
        if self._device not in self._table:
            default = self._table["gfx942" if self._device.startswith("gfx") else table._DEFAULT]
            self._table[self._device] = {dim: list(pair) for dim, pair in default.items()}

    def entries(self) -> dict[Any, Any]:
        """By head dim, and 0 for decode or 1 for prefill."""
        found = {(dim, at): tile for dim, pair in self._table[self._device].items() for at, tile in enumerate(pair)}
        first = [key for key in self._ORDER if key in found]
        return {key: found[key] for key in (*first, *(key for key in found if key not in first))}

    def candidates(self, key: Any, present: Any) -> list[Any]:
        """A field at a time."""
        return neighbours(present, self._PREFILL if key[1] else self._DECODE)

    def time(self, key: Any, tile: Any) -> float:
        """Of a prompt of 8k, or of 64 rows of 2k and one of 16k."""
        dim, is_prefill = key
        setting, heads = _setting(), (32, 8, dim)
        shapes = ((1, 8192, 8192),) if is_prefill else ((64, 2048, 1), (1, 16384, 1))
        with _instead(self._module, "tiles", lambda device, head_dim, *, is_prefill: tile):
            return sum(self._one(setting, heads, given) for given in shapes)

    def _one(self, setting: Setting, heads: tuple[int, int, int], given: tuple[int, int, int]) -> float:
        from llmd_kernels.paged_attention import paged_attention

        call = attention_kernels.call(setting.device, heads, *given)
        return median_ms(setting, lambda: paged_attention(call), as_graph=True)

    def set(self, key: Any, tile: Any) -> None:
        """Take a tile."""
        dim, at = key
        self._table[self._device][dim][at] = tile

    def lines(self) -> list[str]:
        """The table as it now stands."""
        return tables.by_device(self._table)

    def write(self) -> None:
        """Into its file."""
        tables.write(self.path, self.assigned, self.lines())


class Linear:
    """The tiles.py of a quantized linear, by rows of x."""

    assigned = "_BY_ROWS"
    _FIELDS: Fields = {
        "block_m": (16, 32, 64, 128), "block_n": (16, 32, 64, 128, 256), "block_k": (32, 64, 128, 256),
        "split": (1, 2, 4, 8, 16), "warps": (2, 4, 8), "stages": (1, 2, 3, 4, 5),
    }  # fmt: skip

    def __init__(self, name: str, call: Callable[[torch.Tensor], Callable[[], Any]]) -> None:
        self.name, self._call = name, call
        self._tiles = import_module(f"llmd_kernels.{name}.tiles")
        self.path = Path(str(self._tiles.__file__))
        self._entries: dict[int, Any] = dict(self._tiles._BY_ROWS)

    def entries(self) -> dict[Any, Any]:
        """By the most rows."""
        return dict(self._entries)

    def candidates(self, key: Any, present: Any) -> list[Any]:
        """A field at a time."""
        return [tile for tile in neighbours(present, self._FIELDS) if tile.block_m <= max(16, key)]

    def time(self, key: Any, tile: Any) -> float:
        """Of a product of as many rows, 4096 by 4096."""
        setting = _setting()
        x = torch.randn(min(key, _MOST_ROWS), _DEPTH, device=setting.device).bfloat16()
        kernels = import_module(f"llmd_kernels.{self.name}.triton")
        with _instead(kernels, "tile_for", lambda *shape: tile):
            return median_ms(setting, self._call(x), as_graph=True)

    def set(self, key: Any, tile: Any) -> None:
        """Take a tile."""
        self._entries[key] = tile

    def lines(self) -> list[str]:
        """The table as it now stands."""
        return tables.by_rows(list(self._entries.items()))

    def write(self) -> None:
        """Into its file."""
        tables.write(self.path, self.assigned, self.lines())


class Experts:
    """experts/table.py: by the pairs of an expert, for the device at hand."""

    name, assigned = "experts", "_TABLE"
    _FIELDS: Fields = {
        "block_m": (16, 32, 64, 128), "block_n": (32, 64, 128, 256), "block_k": (32, 64, 128, 256), "group": (1, 4, 8, 16),
        "is_few": (False, True), "warps": (4, 8), "stages": (2, 3, 4, 5),
    }  # fmt: skip

    def __init__(self, device: str | None = None) -> None:
        from llmd_kernels.experts import table

        self.path, self._device = Path(table.__file__), device or _device_name()
        self._table = {name: dict(rows) for name, rows in table._TABLE.items()}
        default = "gfx942" if self._device.startswith("gfx") else table._DEFAULT
        self._table.setdefault(self._device, dict(self._table[default]))

    def entries(self) -> dict[Any, Any]:
        """By the most pairs."""
        return dict(self._table[self._device])

    def candidates(self, key: Any, present: Any) -> list[Any]:
        """A field at a time."""
        return neighbours(present, self._FIELDS)

    def time(self, key: Any, tile: Any) -> float:
        """Of a layer of 128 experts in bfloat16."""
        from llmd_kernels import experts

        setting, (count, chosen, hidden, inner) = _setting(), _EXPERTS
        kernels, tokens = import_module("llmd_kernels.experts.triton"), _TOKENS.get(key, 4096)
        sizes = ((2 * inner, hidden), (hidden, inner))
        gate_up, down = (_experts(torch.randn(count, *size, device=setting.device).bfloat16()) for size in sizes)
        x = torch.randn(tokens, hidden, device=setting.device).bfloat16()
        ids, weights = experts.route(torch.randn(tokens, count, device=setting.device), chosen, normalized=True)
        ids = ids.contiguous()
        with _instead(kernels, "tile_for", lambda *shape: tile):
            return median_ms(setting, lambda: experts.experts(x, ids, weights, gate_up, down), as_graph=True)

    def set(self, key: Any, tile: Any) -> None:
        """Take a tile."""
        self._table[self._device][key] = tile

    def lines(self) -> list[str]:
        """The table as it now stands."""
        lines = []
        for device, rows in self._table.items():
            lines += [f'    "{device}": (', *(f"    {line}" for line in tables.by_rows(list(rows.items()))), "    ),"]
        return lines

    def write(self) -> None:
        """Into its file."""
        tables.write(self.path, self.assigned, self.lines())


def _experts(stacked: torch.Tensor) -> Any:
    from llmd_kernels.experts import ExpertWeights

    return ExpertWeights(list(stacked), stacked)


class Constants:
    """Numbers at the top of a module, each for itself; `users` are modules that have imported them by name."""

    assigned = ""

    def __init__(
        self,
        name: str,
        module: str,
        values: Mapping[str, Sequence[int]],
        cases: Mapping[str, Any],
        users: Sequence[str] = (),
    ) -> None:
        self.name, self._cases = name, cases
        self._modules = [import_module(f"llmd_kernels.{each}") for each in (module, *users)]
        self.path = Path(str(self._modules[0].__file__))
        self._values = {key: tuple(given) for key, given in values.items() if hasattr(self._modules[0], key)}
        self._entries: dict[str, int] = {key: getattr(self._modules[0], key) for key in self._values}

    def entries(self) -> dict[Any, Any]:
        """By the number's name."""
        return dict(self._entries)

    def candidates(self, key: Any, present: Any) -> list[Any]:
        """All others."""
        return [value for value in self._values[key] if value != present]

    def time(self, key: Any, tile: Any) -> float:
        """Of all cases."""
        setting, config = _setting(), shape(_MODEL, is_tiny=False)
        given = self._entries[key]
        self._put(key, tile)
        try:
            return sum(median_ms(setting, make(setting, config).ours, as_graph=True) for make in self._cases.values())
        finally:
            self._put(key, given)

    def _put(self, key: str, value: int) -> None:
        for module in self._modules:
            if hasattr(module, key):
                setattr(module, key, value)

    def set(self, key: Any, tile: Any) -> None:
        """Take a number: what is timed from now on has it."""
        self._entries[key] = tile
        self._put(key, tile)

    def lines(self) -> list[str]:
        """All of them, as they now stand."""
        return [f"{key} = {value}" for key, value in self._entries.items()]

    def text(self, source: str) -> str:
        """The file with these numbers."""
        for key, value in self._entries.items():
            source = tables.renumbered(source, key, value)
        return source

    def write(self) -> None:
        """Into its file."""
        self.path.write_text(self.text(self.path.read_text(encoding="utf-8")), encoding="utf-8")


def _fp8(x: torch.Tensor) -> Callable[[], Any]:
    from llmd_kernels.fp8_linear import fp8_linear

    weight = torch.randn(_WIDTH, _DEPTH, device=x.device).to(torch.float8_e4m3fn)
    scale = torch.ones(_WIDTH, device=x.device)
    return lambda: fp8_linear(x, weight, scale)


def _int8(x: torch.Tensor) -> Callable[[], Any]:
    from llmd_kernels import int8_linear

    codes = torch.randint(-127, 128, (_WIDTH, _DEPTH), dtype=torch.int8, device=x.device)
    weight = int8_linear.pack(codes, torch.ones(_WIDTH, device=x.device))
    return lambda: int8_linear.int8_linear(x, weight)


def _grouped(x: torch.Tensor) -> Callable[[], Any]:
    from llmd_kernels import grouped_linear

    codes = torch.randint(16, (_WIDTH, _DEPTH), dtype=torch.uint8, device=x.device)
    scale = torch.rand(_WIDTH, _DEPTH // 128, device=x.device) * 0.01 + 0.001
    weight = grouped_linear.pack(codes, scale, -8 * scale, bits=4, group_size=128)
    return lambda: grouped_linear.grouped_linear(x, weight)


def _device_name() -> str:
    from llmd_kernels.gpu import device_name

    return device_name(torch.device("cuda")) if torch.cuda.is_available() else "sm_90"


_SAMPLED = {name: sampling_kernels.MAKE[f"sampling: {name}"] for name in ("greedy", "temperature", "top_p", "top_k, top_p")}
TARGETS: dict[str, Callable[[], Target]] = {  # the most valuable first
    "paged_attention": Attention,
    "linear": FewRows,
    "grouped_linear": partial(Linear, "grouped_linear", _grouped),
    "fp8_linear": partial(Linear, "fp8_linear", _fp8),
    "experts": Experts,
    "int8_linear": partial(Linear, "int8_linear", _int8),
    "sampling": partial(
        Constants, "sampling", "sampling.tiles",
        {"_PROGRAMS_A_PROCESSOR": (1, 2, 4, 8), "BLOCK": (512, 1024, 2048, 4096), "COUNTED": (128, 256, 512)},
        _SAMPLED, ("sampling.triton",),
    ),
    "lora": partial(
        Constants, "lora", "lora.triton",
        {"_SPLIT": (2, 4, 8, 16), "_BLOCK_K": (32, 64, 128), "_BLOCK_N": (64, 128, 256)}, LORAS,
    ),
}  # fmt: skip
