"""Which way the product of few rows goes on a GPU, by device, outputs and rows of x: a tile of triton.py, or torch's own.

A tuning run writes this table, torch among what it tries; until it has, a device that is not named here is torch's. The
tiles for sm_90 are reckoned, and given only where reckoning and what others measured agree:

- One row or two: torch calls cuBLAS, which fills tiles of 64 rows and more, and splits their depth over a second launch. On
  an H20 a pass over the weight by plain vectors took 25 … 44 % less for one row (RustInfer, pull request 4); on Blackwell
  it was ahead of cuBLAS for one row and two, and behind from four on, at 4 … 100 million weights (vLLM, pull request
  47712). The bytes are the same, the launches fewer: gates and ups need no second one for their activation, logits none to
  become float32.
- Three to 64 rows: both ways read W once through shared memory into tensor cores. Which loses less in between is not
  for paper to say.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """One way through W."""

    block_m: int  # rows of x: 1 or 2 by plain vectors, 16 and more by tensor cores
    block_n: int  # rows of W
    block_k: int  # columns of W at a time
    shares: int  # programs among which the depth of the same rows may be divided, at most
    warps: int
    stages: int  # copies of W's next columns on their way, where they go through shared memory


ROWS = (1, 2, 4, 8, 16, 32, 64)  # of x, up to which each entry goes
_SIXTEEN, _MANY = Tile(16, 64, 128, 8, 4, 4), Tile(64, 128, 128, 4, 8, 3)
# What a device's tuning begins with, for each of ROWS: copies ahead that its shared memory holds.
FIRST: dict[str, tuple[Tile, ...]] = {
    "sm_90": (Tile(1, 4, 512, 1, 2, 1), Tile(2, 4, 512, 1, 2, 1), *[_SIXTEEN] * 3, Tile(32, 64, 128, 8, 4, 4), _MANY),
    "sm_80": (
        Tile(1, 4, 512, 1, 2, 1), Tile(2, 4, 512, 1, 2, 1), *[_SIXTEEN] * 3, Tile(32, 64, 128, 8, 4, 4),
        Tile(64, 128, 64, 4, 8, 3),
    ),
    "gfx942": (
        Tile(1, 4, 512, 1, 1, 1), Tile(2, 4, 512, 1, 1, 1), *[Tile(16, 64, 128, 8, 4, 2)] * 3, Tile(32, 64, 128, 8, 4, 2),
        Tile(64, 64, 128, 4, 4, 2),
    ),
}  # fmt: skip
# device: outputs, up to so many: an entry for each of ROWS; None: torch
_TABLE: dict[str, dict[int, tuple[Tile | None, ...]]] = {
    "sm_90": {
        2048: (
            Tile(1, 2, 1024, 1, 4, 1),
            Tile(2, 2, 1024, 1, 4, 1),
            None,
            None,
            None,
            None,
            None,
        ),
        8192: (
            Tile(1, 4, 512, 1, 2, 1),
            Tile(2, 4, 512, 1, 2, 1),
            None,
            None,
            None,
            None,
            None,
        ),
        1 << 62: (
            Tile(1, 4, 512, 1, 2, 1),
            Tile(2, 4, 512, 1, 2, 1),
            None,
            None,
            None,
            None,
            None,
        ),
    },
}
_PROGRAMS_A_PROCESSOR = 2
_LEAST_STEPS = 4  # turns of its loop, for a program


def tile_for(device: str, num_rows: int, width: int) -> Tile | None:
    """For x [num_rows, …] and `width` outputs on a device named as compilers do: sm_90, gfx942. None: torch's way."""
    widths = _TABLE.get(device)
    if widths is None or not 0 < num_rows <= ROWS[-1]:
        return None
    entries = next(entries for most, entries in widths.items() if width <= most)
    return next(tile for rows, tile in zip(ROWS, entries, strict=True) if num_rows <= rows)


def num_shares(most: int, num_blocks: int, num_steps: int, num_processors: int) -> int:
    """Programs among which each block's steps are divided, a power of two up to `most`: as few as fill the device."""
    shares, wanted = 1, _PROGRAMS_A_PROCESSOR * num_processors
    while 2 * shares <= most and num_blocks * shares < wanted and num_steps >= 2 * shares * _LEAST_STEPS:
        shares *= 2
    return shares
