"""Which tile the GPU's product uses, by the rows of x. The figures are reckoned from the sizes of caches and registers."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Rows and columns of the output that a program computes, input features at a time, how it runs, and among how many
    programs the features may be shared."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    shares: int


_BY_ROWS: tuple[tuple[int, Tile], ...] = (  # up to so many rows
    (16, Tile(16, 64, 256, 4, 4, 8)),
    (64, Tile(64, 64, 256, 4, 3, 4)),
    (1 << 62, Tile(128, 128, 128, 8, 3, 1)),
)


def tile_for(num_rows: int) -> Tile:
    """The tile for so many rows of x."""
    return next(tile for most, tile in _BY_ROWS if num_rows <= most)
