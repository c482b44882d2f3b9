"""Compiles the product of few rows ahead of time, and reads for sm_90 what a pass over the weight costs; prints troubles."""

import json
import os

import torch
from kernels.compiling import TARGETS, disassembled, launches, unfit

from llmd_kernels.linear import triton as kernels
from llmd_kernels.linear.table import FIRST

MOST_INSTRUCTIONS = {1: 2.0, 2: 2.7, 16: 0.9, 32: 0.9, 64: 0.9}  # for a byte of W and thread, by rows
TARGET = os.environ["LLMD_TEST_TARGET"]
kernels.num_processors = lambda device: 132


def cases():
    """Each of the device's first tiles: as it goes through a layer's output, and through gates and ups."""
    for tile in dict.fromkeys(FIRST[TARGET]):
        yield f"gated {tile}", tile, 2 * 18944, kernels.SILU, torch.bfloat16
        if TARGET == "sm_90":
            yield f"shared {tile}", tile, 3584, kernels.PLAIN, torch.bfloat16
    yield "half", FIRST[TARGET][0], 3584, kernels.PLAIN, torch.float16


def compiled(tile, width, kind, dtype):
    """The kernel that is launched, and whether its depth is shared."""
    x, weight, bias = (torch.empty(size, dtype=dtype) for size in ((tile.block_m, 3584), (width, 3584), (width,)))
    with launches(TARGETS[TARGET][0]) as made:
        kernels.linear(x, weight, bias, dtype, tile, kind)
    return made[0].built, made[0].grid[-1] > 1 and tile.block_m > 2


def slowness(code, loop, tile):
    """What keeps a kernel from reading W as fast as memory gives it; empty: nothing."""
    wide = "LDG.E.EF.128" if tile.block_m <= 2 else "LDGSTS.E.BYPASS.128"
    loads, all_loads, found = count(loop, wide), count(loop, "LDG.", "LDGSTS."), []
    size = tile.block_n * tile.block_k * 2 // (32 * tile.warps)  # bytes of W for a thread in a turn
    if loads < size // 16 or all_loads != count(loop, wide, "LDG.E.128"):
        found.append(f"{loads} loads of 128 bits, {all_loads} loads in all, for {size} bytes")
    if count(code, "LDL", "STL"):
        found.append("registers are spilled")
    if len(loop) / size > MOST_INSTRUCTIONS[tile.block_m]:
        found.append(f"{len(loop)} instructions for {size} bytes")
    if tile.block_m > 2 and not count(loop, "HGMMA.64x"):
        found.append("no products of warp groups")
    if tile.block_m <= 2 and count(loop, "LDS", "STS", "BAR", "SHFL"):
        found.append("threads wait for each other")
    return "; ".join(found)


def arrival(code):
    """What is missing for the last program to see the others' sums; empty: nothing."""
    place = next(index for index, text in enumerate(code) if text.startswith("ATOMG"))
    before, behind = code[:place], code[place:]
    if not count(before[-6:], "MEMBAR.ALL.GPU", "MEMBAR.SC.GPU") or not count(before[-20:], "BAR.SYNC"):
        return "sums may be counted before they are stored"
    return "" if count(behind[:4], "CCTL.IVALL") and count(behind, "LDG.E.128.STRONG.GPU") else "old sums may be read"


def count(code, *names):
    """Instructions whose name begins with one of these."""
    return sum(text.startswith(names) for text in code)


def check(tile, width, kind, dtype):
    built, is_shared = compiled(tile, width, kind, dtype)
    found = [unfit(built, *TARGETS[TARGET])]
    if TARGET == "sm_90":
        code, loops = disassembled(built)
        start, end = max(loops, key=lambda ends: ends[1] - ends[0])
        found += [slowness(code, code[start : end + 1], tile), arrival(code) if is_shared else ""]
        if is_shared != (tile.block_m > 2 and kind == kernels.PLAIN):
            found.append("the depth is shared" if is_shared else "the depth is not shared")
    return "; ".join(filter(None, found))


print(json.dumps({name: check(*case) for name, *case in cases()}))
