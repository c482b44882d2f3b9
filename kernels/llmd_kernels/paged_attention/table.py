"""How attention is cut into programs, by device and head dim; the grids hang on devices, tokens and heads, never on lengths.

These are reckoned from machine code, not measured: tiles whose loads run two ahead within the device's shared memory, and as
many programs of decode as registers and shared memory hold. A tuning run may replace the numbers, nothing else.
"""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """One kernel's shape."""

    block_m: int  # queries times query heads of a KV head, at least 16
    block_n: int  # positions at once
    num_warps: int
    num_stages: int  # of the loads before products: 5 is two tiles of keys and values ahead, the block table a third
    programs: int = 1  # that a multiprocessor holds: decode's grid


# device: head dim, padded to a power of two: tiles of decode and of prefill
_TABLE: dict[str, dict[int, tuple[Tiles, Tiles]]] = {
    "sm_90": {
        64: (Tiles(16, 128, 4, 5, 3), Tiles(128, 64, 4, 5, 2)),
        128: (Tiles(16, 64, 4, 5, 3), Tiles(128, 64, 8, 5, 1)),
        256: (Tiles(16, 32, 4, 5, 2), Tiles(128, 32, 8, 5, 1)),
    },
    "sm_80": {
        64: (Tiles(16, 128, 4, 5, 2), Tiles(128, 64, 8, 5, 1)),
        128: (Tiles(16, 64, 4, 5, 2), Tiles(128, 64, 8, 5, 1)),
        256: (Tiles(16, 32, 4, 5, 2), Tiles(64, 32, 8, 5, 1)),
    },
    "sm_89": {
        64: (Tiles(16, 128, 4, 3, 2), Tiles(128, 64, 8, 3, 1)),
        128: (Tiles(16, 64, 4, 3, 2), Tiles(64, 64, 4, 3, 1)),
        256: (Tiles(16, 32, 4, 3, 2), Tiles(64, 32, 8, 3, 1)),
    },
    "gfx942": {
        64: (Tiles(16, 64, 4, 1, 4), Tiles(64, 64, 4, 1, 2)),
        128: (Tiles(16, 64, 4, 1, 2), Tiles(64, 32, 4, 1, 2)),
        256: (Tiles(16, 32, 4, 1, 2), Tiles(32, 32, 4, 1, 2)),
    },
}
_DEFAULT = "sm_89"  # the least shared memory of the CUDA devices
LEAST_TILES = 2  # of a program of decode: less is not worth a join
MAX_PARTS = 64  # of a row and head: more would take longer to join than they save
MAX_ROWS = 256  # looked through at once by each program of decode; more where there are more
JOINED = 8192  # numbers at once, in registers
MOST_IN_WORDS = 16384  # numbers of prefill's queries, where those of the cache are taken out of words


def tiles(device: str, head_dim: int, *, is_prefill: bool) -> Tiles:
    """For a padded head dim on a device named as compilers do: sm_90, gfx942."""
    widths = _TABLE.get(device, _TABLE["gfx942" if device.startswith("gfx") else _DEFAULT])
    width = min((known for known in widths if known >= head_dim), default=256)
    return widths[width][is_prefill]


def fitted(shape: Tiles, group: int, *, heads_are_columns: bool = False, is_wide: bool = False) -> Tiles:
    """A tile with room for all query heads of a KV head, which tensor cores take by 16 rows or by 8 columns.

    More of them than that leave registers and shared memory for two programs. `is_wide`: of 32-bit numbers, half as many.
    """
    if is_wide:
        rows, positions = max(16, shape.block_m // 2), max(16, shape.block_n // 2)
        shape = shape._replace(block_m=rows, block_n=positions, programs=min(shape.programs, 2))
    heads = 1 << (group - 1).bit_length()
    least = 8 if heads_are_columns else shape.block_m
    programs = shape.programs if heads <= least else min(shape.programs, 2)
    return shape._replace(block_m=max(least, heads), programs=programs)


def registers(shape: Tiles) -> int:
    """Of a thread, at most, for as many programs on a CUDA device's multiprocessor as a tile says."""
    return min(255, (1 << 16) // (shape.programs * shape.num_warps * 32) // 8 * 8)
