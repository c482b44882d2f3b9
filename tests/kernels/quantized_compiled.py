"""Compiles the quantized products' Triton kernels ahead of time, by what their wrappers launch; prints which are unfit.

For sm_90 it counts what a byte of W costs, in instructions of a thread. An H200's multiprocessors carry out about 28 · 10¹²
of those a second, and its memory brings 4.3 · 10¹² bytes: more than 6.6 instructions a byte would keep it waiting.
"""

import json
import os
from functools import partial

import torch
from kernels.compiling import TARGETS, disassembled, launches, unfit

from llmd_kernels.fp8_linear import grid_of
from llmd_kernels.fp8_linear import tiles as fp8_tiles
from llmd_kernels.fp8_linear import triton as fp8
from llmd_kernels.grouped_linear import GroupedWeight
from llmd_kernels.grouped_linear import tiles as grouped_tiles
from llmd_kernels.grouped_linear import triton as grouped
from llmd_kernels.int8_linear import tiles as int8_tiles
from llmd_kernels.int8_linear import triton as int8
from llmd_kernels.linear import triton as linear

TARGET = os.environ["LLMD_TEST_TARGET"]
WIDTH = DEPTH = 4096
WIDE = 1 << 15
ROWS = (1, 20, 64, 4096) if TARGET == "sm_90" else (1, 4096)  # the rest differs in little, and takes its time
fp8.num_processors = int8.num_processors = linear.num_processors = lambda device: 132
fp8.has_ptx = grouped.has_ptx = lambda device: TARGET.startswith("sm")
fp8.has_e4m3 = lambda device: TARGET == "sm_90"


def inputs(rows):
    return torch.empty(rows, DEPTH, dtype=torch.bfloat16)


def four_or_eight_bits(rows, bits, group, *, has_offset):
    scale = torch.empty(DEPTH // group, WIDE, dtype=torch.float16)
    packed = torch.empty(DEPTH // 64, WIDE, 8 * bits, dtype=torch.uint8)
    offset = scale if has_offset else None
    weight = GroupedWeight(packed, scale, offset, None, bits, group, 8, DEPTH, WIDE, 1.0, "chunks")
    grouped.linear(inputs(rows), weight, torch.empty(WIDE, dtype=torch.bfloat16))


def eight_bit_floats(rows, block, *, is_scaled):
    weight = torch.empty(WIDTH, DEPTH, dtype=torch.float8_e4m3fn)
    scale = torch.empty(WIDTH) if block is None else torch.empty(WIDTH // block, DEPTH // block)
    grid = grid_of(weight, scale, None if block is None else (block, block))
    bias = torch.empty(WIDTH, dtype=torch.bfloat16)
    if is_scaled:
        fp8.linear_of_e4m3(inputs(rows), block or DEPTH, None, weight, *grid, bias)
    else:
        fp8.linear(inputs(rows), None, weight, *grid, bias)


def eight_bits(rows):
    weight, sums = torch.empty(WIDTH, DEPTH, dtype=torch.int8), torch.empty(WIDTH, dtype=torch.int32)
    int8.int8_linear(inputs(rows), weight, torch.empty(WIDTH), sums, torch.empty(WIDTH), None, 0)


def cases():
    """Name, rows, call, bytes of W that a program reads in a turn, and instructions a byte may cost by 16, 32, 64 rows."""
    for rows in ROWS:
        for bits, group, has_offset, most in (
            (4, 128, True, (5.6, 9, 13)), (4, 128, False, (5.6, 9, 13)), (8, 128, True, (4.5, 6.2, 6.5)),
            (4, 32, True, (8.5, 13.5, 22.5)), (4, 24, True, ()),
        ):  # fmt: skip
            if (TARGET == "sm_90" and rows != 20) or (group == 128 and has_offset):
                size = grouped_tiles.tile_for(rows, WIDE, DEPTH // 64).block_n * 8 * bits * (1 + (group == 128))
                call = partial(four_or_eight_bits, rows, bits, group, has_offset=has_offset)
                yield f"grouped {rows} {bits} {group} {has_offset}", rows, call, size, most
        if rows == 20:
            continue
        size = fp8_tiles.tile_for(rows).block_n * fp8_tiles.BLOCK_K
        for block, is_scaled, most in (
            (None, False, (4.6, 5, 5)),
            (128, True, (2.3, 3.4, 3.4)),
            (None, True, (1.6, 2.2, 2.2)),
        ):
            call = partial(eight_bit_floats, rows, block, is_scaled=is_scaled)
            yield f"fp8 {rows} {block} {is_scaled}", rows, call, size, most
        tile = int8_tiles.tile_for(rows)
        yield f"int8 {rows}", rows, partial(eight_bits, rows), tile.block_n * tile.block_k, (0.9, 1.1, 1.1)


def slowness(built, size, most):
    """Why a kernel of sm_90 keeps memory waiting, in words; empty if it does not."""
    code, loops = disassembled(built)
    start, end = max(loops, key=lambda ends: ends[1] - ends[0])
    loop, size = code[start : end + 1], size // (32 * built.metadata.num_warps)
    if any(text.startswith(("LDL", "STL")) for text in loop):
        return "registers are spilled in the loop"
    if not any("MMA" in text.split()[0] for text in loop) or not any(text.startswith("LDGSTS") for text in loop):
        return "no tensor cores, or nothing is copied ahead of them"
    return "" if len(loop) <= most * size else f"{len(loop)} instructions for {size} bytes"


def trouble(name, rows, call, size, most):
    with launches(TARGETS[TARGET][0]) as made:
        call()
    found = {f"{TARGET} {name} {launch.name}": unfit(launch.built, *TARGETS[TARGET]) for launch in made}
    if TARGET == "sm_90" and most and rows <= 64:
        found[f"{name}, speed"] = slowness(
            made[-1].built, size, most[(16, 32, 64).index(max(16, 1 << (rows - 1).bit_length()))]
        )
    return found


print(json.dumps({name: words for case in cases() for name, words in trouble(*case).items()}))
