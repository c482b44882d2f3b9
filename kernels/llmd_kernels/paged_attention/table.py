"""How attention is cut into programs, by device and shape; the grids hang on rows and heads alone, never on lengths.

These are reckoned, not measured: tiles that fit the device's shared memory with two stages, and as many splits as give each
multiprocessor two programs. A tuning run may replace the numbers, nothing else.
"""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """One kernel's shape."""

    block_m: int  # queries times query heads of a KV head, at least 16
    block_n: int  # positions at once
    num_warps: int
    num_stages: int


# device: head dim, padded to a power of two: tiles of decode and of prefill
_TABLE: dict[str, dict[int, tuple[Tiles, Tiles]]] = {
    "sm_90": {
        64: (Tiles(16, 128, 4, 3), Tiles(128, 64, 4, 3)),
        128: (Tiles(16, 64, 4, 3), Tiles(128, 64, 8, 3)),
        256: (Tiles(16, 32, 4, 3), Tiles(64, 32, 8, 2)),
    },
    "sm_80": {
        64: (Tiles(16, 128, 4, 2), Tiles(128, 64, 8, 2)),
        128: (Tiles(16, 64, 4, 2), Tiles(64, 64, 4, 2)),
        256: (Tiles(16, 32, 4, 2), Tiles(64, 32, 8, 2)),
    },
    "gfx942": {
        64: (Tiles(16, 64, 4, 1), Tiles(64, 64, 4, 1)),
        128: (Tiles(16, 64, 4, 1), Tiles(64, 32, 4, 1)),
        256: (Tiles(16, 32, 4, 1), Tiles(32, 32, 4, 1)),
    },
}
_DEFAULT = "sm_80"  # the least shared memory of the CUDA devices
MAX_SPLITS = 32
_PROGRAMS_A_PROCESSOR = 2


def tiles(device: str, head_dim: int, *, is_prefill: bool) -> Tiles:
    """For a padded head dim on a device named as compilers do: sm_90, gfx942."""
    widths = _TABLE.get(device, _TABLE["gfx942" if device.startswith("gfx") else _DEFAULT])
    width = min((known for known in widths if known >= head_dim), default=256)
    return widths[width][is_prefill]


def num_splits(num_programs: int, num_processors: int) -> int:
    """Parts of each sequence that decode computes at once, a power of two."""
    wanted = num_processors * _PROGRAMS_A_PROCESSOR // max(1, num_programs)
    return min(MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1)) if wanted else 1
