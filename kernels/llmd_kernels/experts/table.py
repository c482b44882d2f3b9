"""How experts are cut into programs, by device and shape. Grids hang on tokens, k and E alone, never on what was chosen.

These are reckoned from the sizes of caches and registers, not measured; a tuning run may replace the numbers, nothing else.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Tile(NamedTuple):
    """The part of the output that a program computes, and how it runs."""

    block_m: int  # token-expert pairs of one expert
    block_n: int  # rows of its weight
    block_k: int  # input features at a time
    group: int  # blocks of pairs whose programs run side by side, so that they share what they read
    is_few: bool  # the weight is the left factor: its rows fill the tensor cores, however few pairs there are
    warps: int
    stages: int


# device: at most so many pairs of an expert, and the tile
_TABLE: dict[str, tuple[tuple[int, Tile], ...]] = {
    "sm_90": (
        (16, Tile(16, 64, 128, 1, True, 4, 4)),
        (32, Tile(32, 64, 128, 1, True, 4, 4)),
        (64, Tile(64, 128, 64, 1, True, 4, 4)),
        (1 << 62, Tile(128, 256, 64, 8, False, 8, 3)),
    ),
    "sm_80": (
        (16, Tile(16, 64, 128, 1, True, 4, 4)),
        (32, Tile(32, 64, 128, 1, True, 4, 4)),
        (64, Tile(64, 128, 64, 1, True, 4, 3)),
        (1 << 62, Tile(128, 128, 64, 8, False, 8, 3)),
    ),
    "sm_86": (
        (16, Tile(16, 64, 128, 1, True, 4, 3)),
        (32, Tile(32, 64, 128, 1, True, 4, 3)),
        (64, Tile(64, 64, 64, 1, True, 4, 3)),
        (1 << 62, Tile(128, 64, 64, 8, False, 8, 3)),
    ),
    "gfx942": (
        (16, Tile(16, 64, 128, 1, True, 4, 2)),
        (32, Tile(32, 64, 128, 1, True, 4, 2)),
        (64, Tile(64, 64, 64, 1, True, 4, 2)),
        (1 << 62, Tile(128, 128, 64, 8, False, 8, 2)),
    ),
}
_ALIKE = {"sm_87": "sm_80", "sm_100": "sm_80", "sm_103": "sm_80"}  # shared memory as large, at least
_DEFAULT = "sm_86"  # the least shared memory of the CUDA devices that Triton compiles for, 99 KiB
_SPREAD = 2  # busy experts get about so many times the mean
_PROGRAMS_A_PROCESSOR = 2
_NARROWEST = 32
_FEW = 64  # pairs of a block, whose outputs are kept in float32
BLOCK_K = 128  # input features at a time where weights are of 8 bits, at most: blocks of scales begin where a step does

Format = Literal["dense", "groups", "int8", "fp8"]

MAX_EXPERTS = 512  # of a layer, that are sorted in registers
CHUNK = 512  # pairs that a program puts in order


def tile_for(device: str, num_tokens: int, num_chosen: int, num_experts: int, itemsize: int = 2) -> Tile:
    """For a device named as compilers do, sm_90 or gfx942, and activations of so many bytes."""
    device = _ALIKE.get(device, device)
    rows = _TABLE.get(device, _TABLE["gfx942" if device.startswith("gfx") else _DEFAULT])
    likely = min(num_tokens, _SPREAD * -(-num_tokens * num_chosen // num_experts))
    return next(tile for most, tile in rows if min(likely, _FEW if itemsize == 4 else likely) <= most)


def shaped(tile: Tile, form: Format, itemsize: int) -> Tile:
    """The same for weights of a format and activations of so many bytes: what they need beside fits the registers."""
    is_many = tile.block_m > _FEW
    if itemsize == 4:  # for tests and small models: no tensor cores, and twice the shared memory
        return tile._replace(block_n=64, block_k=BLOCK_K if form == "fp8" else 32, is_few=True, warps=4, stages=2)
    if form == "dense":
        return tile
    block_n = min(tile.block_n, 128) if is_many else 128 if form == "groups" and tile.block_m < _FEW else 64
    if form == "groups":
        return tile._replace(block_n=block_n, is_few=True)
    return tile._replace(block_n=block_n, block_k=64 if is_many and form == "fp8" else BLOCK_K, stages=min(tile.stages, 3))


def narrowed(tile: Tile, num_blocks: int, width: int, num_processors: int) -> Tile:
    """The same for `width` rows of weights, narrower where that gives idle multiprocessors something to do."""
    block_n, wanted = tile.block_n, _PROGRAMS_A_PROCESSOR * num_processors
    while tile.block_m <= _FEW and block_n > _NARROWEST and num_blocks * -(-width // block_n) < wanted:
        block_n //= 2
    return tile._replace(block_n=block_n)


def keeps_sums(tile: Tile) -> bool:
    """Whether the pairs' outputs are few enough to be kept in float32 until they are added up."""
    return tile.block_m <= _FEW


def num_blocks(num_tokens: int, num_chosen: int, num_experts: int, block_m: int) -> int:
    """Blocks of `block_m` pairs that any choice fills at most, where no block is of two experts."""
    num_pairs = num_tokens * num_chosen
    touched = min(num_pairs, num_experts)
    return touched + (num_pairs - touched) // block_m


def sorted_at_once(num_experts: int) -> int:
    """Pairs that a program compares with all experts at once; `num_experts` is a power of two."""
    return max(16, min(128, 8192 // num_experts))
