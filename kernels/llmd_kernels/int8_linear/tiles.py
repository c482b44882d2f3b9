"""Which tile the GPU's product uses, by the rows of x. The figures are reckoned from the sizes of caches and registers."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Rows and columns of the output that a program computes, input features at a time, and how it runs."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


_BY_ROWS: tuple[tuple[int, Tile], ...] = (  # up to so many rows
    (16, Tile(16, 32, 256, 4, 4)),
    (64, Tile(64, 64, 128, 4, 3)),
    (1 << 62, Tile(128, 128, 64, 8, 3)),
)


def tile_for(num_rows: int) -> Tile:
    """The tile for so many rows of x."""
    return next(tile for most, tile in _BY_ROWS if num_rows <= most)
