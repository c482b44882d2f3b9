"""Which tile the GPU's product uses, by the rows of x. The figures are reckoned from the sizes of caches and registers."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Rows and columns of the output that a program computes, programs that share the input features, and how it runs."""

    block_m: int
    block_n: int
    split: int
    warps: int
    stages: int


# Up to 32 rows two warps: their products are of 16 rows of W, whose bytes come to registers as those products want them.
# More go by the products of warp groups on sm_90, which multiply 64 rows of W at once.
_BY_ROWS: tuple[tuple[int, Tile], ...] = (  # up to so many rows; split: at most
    (16, Tile(16, 128, 8, 2, 4)),
    (32, Tile(32, 64, 8, 2, 4)),
    (64, Tile(64, 64, 4, 4, 3)),
    (1 << 62, Tile(128, 128, 1, 8, 3)),
)
ONE_BY_ONE: tuple[tuple[int, Tile], ...] = (  # the same for weights that are scaled one by one
    (16, Tile(16, 64, 1, 4, 4)),
    (64, Tile(64, 64, 1, 4, 3)),
    (1 << 62, Tile(128, 128, 1, 8, 3)),
)
_ENOUGH_PROGRAMS = 528  # four for each of an H100's multiprocessors
_LEAST_CHUNKS = 4  # of 64 input features, for a program
_NARROW = 64  # columns at most, where wider tiles would be too few


def tile_for(num_rows: int, width: int, num_chunks: int) -> Tile:
    """The tile for x [num_rows, 64 · num_chunks] and `width` outputs."""
    tile = next(tile for most, tile in _BY_ROWS if num_rows <= most)
    if tile.split > 1 and width * tile.split < _ENOUGH_PROGRAMS * tile.block_n:
        tile = tile._replace(block_n=min(tile.block_n, _NARROW))
    programs, split = -(-width // tile.block_n), 1
    while 2 * split <= tile.split and programs * split < _ENOUGH_PROGRAMS and num_chunks >= 2 * split * _LEAST_CHUNKS:
        split *= 2
    return tile._replace(split=split)
