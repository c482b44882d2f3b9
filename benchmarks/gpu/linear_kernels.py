"""The linears of a decode step at a model's sizes beside torch's own, and the tuning of how few rows go through a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu import tables
from benchmarks.gpu.setting import Setting, Work, median_ms
from llmd_kernels.linear import gated_linear, linear, table
from llmd_kernels.silu_mul import silu_mul

_ROWS = (1, 2, 16, 64)
_FLOAT_BYTES = 2
# Outputs and depth of what is timed, by the class of outputs: of 0.5B, 7B and 8B models, and of a share of one among ranks.
_SHAPES: dict[int, tuple[tuple[int, int], ...]] = {
    2048: ((1152, 896), (896, 4864), (1536, 4096)),
    8192: ((4608, 3584), (3584, 18944), (4096, 4096)),
    1 << 62: ((37888, 3584), (28672, 4096)),
}


def _sizes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Outputs and depth of each linear of a layer, and of the head."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim, within = hidden // heads, config["intermediate_size"]
    return {
        "qkv": ((heads + 2 * config["num_key_value_heads"]) * dim, hidden), "o": (hidden, hidden),
        "gate_up": (2 * within, hidden), "down": (hidden, within), "head": (config["vocab_size"], hidden),
    }  # fmt: skip


def _ways(name: str, weight: torch.Tensor, x: torch.Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Ours and torch's, with what follows the product in a step."""
    if name == "gate_up":
        return lambda: gated_linear(x, weight, None, silu_mul), lambda: silu_mul(F.linear(x, weight))
    if name == "head":
        return lambda: linear(x, weight, out_dtype=torch.float32), lambda: F.linear(x, weight).float()
    return lambda: linear(x, weight), lambda: F.linear(x, weight)


def _make(name: str, wanted: int) -> Callable[[Setting, dict[str, Any]], Work]:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        width, depth = _sizes(config)[name]
        num_rows = min(wanted, 3) if setting.is_tiny else wanted
        weight, x = (torch.randn(size, depth, device=setting.device).bfloat16() for size in (width, num_rows))
        ours, plain = _ways(name, weight, x)
        written = num_rows * (width // 2 if name == "gate_up" else 2 * width if name == "head" else width)
        return Work(ours, plain, _FLOAT_BYTES * (weight.numel() + x.numel() + written), 2 * num_rows * weight.numel())

    return make


MAKE = {
    f"linear {name}, {rows} rows": _make(name, rows)
    for rows, name in product(_ROWS, ("qkv", "o", "gate_up", "down", "head"))
}


class FewRows:
    """linear/table.py: a tile or torch's way, by outputs and rows of x, for the device at hand."""

    name, assigned = "linear", "_TABLE"

    def __init__(self, device: str | None = None) -> None:
        self.path, self._device = Path(table.__file__), device or _device_name()
        self._table = {name: {most: list(tiles) for most, tiles in widths.items()} for name, widths in table._TABLE.items()}
        self._table.setdefault(self._device, {most: [None] * len(table.ROWS) for most in _SHAPES})

    def entries(self) -> dict[Any, Any]:
        """By outputs, up to so many, and rows, up to so many."""
        widths = self._table[self._device].items()
        return {(most, rows): tile for most, tiles in widths for rows, tile in zip(table.ROWS, tiles, strict=True)}

    def candidates(self, key: Any, present: Any) -> list[Any]:
        """By plain vectors for one row and two, by tensor cores for any number, and torch's way."""
        most, rows = key
        first = table.FIRST.get(self._device, table.FIRST["gfx942" if self._device.startswith("gfx") else "sm_80"])
        tiles = [*(_by_vectors(rows, most) if rows <= 2 else ()), *_by_tensor_cores(first[max(table.ROWS.index(rows), 2)])]
        return [tile for tile in tiles if tile != present] + [None]

    def time(self, key: Any, tile: Any) -> float:
        """Milliseconds of a pass over one weight of each of the shapes."""
        return sum(self._pass(width, depth, key[1], tile) for width, depth in _SHAPES[key[0]])

    def _pass(self, width: int, depth: int, num_rows: int, tile: Any) -> float:
        setting = Setting(torch.device("cuda"), False, "", Path(), {})
        weight, x = (torch.randn(size, depth, device=setting.device).bfloat16() for size in (width, num_rows))
        if tile is None:
            return median_ms(setting, lambda: F.linear(x, weight), as_graph=True)
        from llmd_kernels.linear import triton

        return median_ms(setting, lambda: triton.linear(x, weight, None, x.dtype, tile), as_graph=True)

    def set(self, key: Any, tile: Any) -> None:
        """Take a way."""
        self._table[self._device][key[0]][table.ROWS.index(key[1])] = tile

    def lines(self) -> list[str]:
        """The table as it now stands."""
        lines = []
        for device, widths in self._table.items():
            lines.append(f'    "{device}": {{')
            for most, tiles in widths.items():
                lines += [f"        {'1 << 62' if most == 1 << 62 else most}: ("]
                lines += [f"            {'None' if tile is None else tables.called(tile)}," for tile in tiles]
                lines.append("        ),")
            lines.append("    },")
        return lines

    def write(self) -> None:
        """Into its file."""
        tables.write(self.path, self.assigned, self.lines())


def _by_vectors(rows: int, most: int) -> list[table.Tile]:
    """Rows of W and columns at a time for each of them: two to eight loads of 128 bits a thread."""
    sizes: Sequence[tuple[int, int, int]] = ((2, 1024, 4), (4, 512, 2), (4, 256, 1), (4, 1024, 4), (8, 512, 2), (4, 1024, 2))
    if most <= 2048:
        sizes = ((2, 1024, 4), (2, 2048, 8), (4, 512, 2), (2, 512, 2), (4, 1024, 4))
    return [table.Tile(rows, block_n, block_k, 1, warps, 1) for block_n, block_k, warps in sizes]


def _by_tensor_cores(first: table.Tile) -> list[table.Tile]:
    """Around a device's first tile for so many rows."""
    twice = first._replace(block_n=2 * first.block_n, warps=max(4, first.warps))
    deeper, shallower = first._replace(block_k=2 * first.block_k, stages=max(2, first.stages - 1)), first._replace(stages=3)
    return list(
        dict.fromkeys(
            (
                first, twice, deeper, shallower, twice._replace(stages=max(2, first.stages - 1)),
                first._replace(shares=1), first._replace(block_k=64, stages=2 * first.stages), first._replace(warps=8),
            )
        )
    )  # fmt: skip


def _device_name() -> str:
    from llmd_kernels.gpu import device_name

    return device_name(torch.device("cuda")) if torch.cuda.is_available() else "sm_90"
