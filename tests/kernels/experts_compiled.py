"""Compiles the experts' Triton kernels ahead of time for one target; prints by kernel what is wrong."""

import json
import os

from kernels.compiling import TARGETS, trouble
from triton.backends.compiler import GPUTarget

from llmd_kernels.experts import table, triton_dense, triton_eights, triton_groups, triton_sorting
from llmd_kernels.experts import triton as gpu
from llmd_kernels.fp8_linear import triton as fp8

TARGET = os.environ["LLMD_TEST_TARGET"]
DEVICES = {**TARGETS, "sm_89": (GPUTarget("cuda", 89, 32), 99 << 10)}  # as large as a GPU's shared memory is at home
EVEN = ("width", "depth", "x_stride", "group_size")  # as launchers find models' sizes
PROCESSORS = 132
SORTING = {
    "order": "*i32", "blocks": "*i32", "counts": "*i32", "ids": "*i64", "weights": "*fp32", "logits": "*bf16",
}  # fmt: skip
DENSE = {"out": "*bf16", "x": "*bf16", "w": "*bf16", "order": "*i32", "blocks": "*i32"}
GROUPED = {
    **DENSE,
    "w": "*u8",
    "scale": "*fp16",
    "offset": "*fp16",
    "factors": "*fp32",
    "columns": "*i32",
    "sums": "*fp32",
    "lift": "fp32",
}
INT8 = {**DENSE, "x": "*i8", "w": "*i8", "x_scale": "*fp32", "w_scale": "*fp32"}
FP8 = {**DENSE, "w": "*u8", "x_scale": "*fp32", "w_scale": "*fp32"}


def tiles(form, itemsize=2, all_tokens=(1, 128, 8192)):
    """Those of Mixtral's sizes, on one device also those that are narrowed for want of programs."""
    for tokens in all_tokens:
        tile = table.shaped(table.tile_for(TARGET, tokens, 2, 8, itemsize), form, itemsize)
        is_narrowed = TARGET == "sm_90" and form in ("dense", "groups")
        for one in dict.fromkeys((tile, table.narrowed(tile, 2, 64, PROCESSORS) if is_narrowed else tile)):
            yield f"{tokens} {one.block_n}", one


def product(tile, gated, types, **more):
    sizes = {"GROUP": tile.group, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    constants = {"GATED": gated, "KIND": 0, **sizes, **more}
    out = {"out": "*fp32"} if table.keeps_sums(tile) and not gated else {}
    return types | out, constants, {"num_warps": tile.warps, "num_stages": tile.stages}


def sorting():
    sizes = {"E": 256, "CHUNK": table.CHUNK, "BLOCK": table.sorted_at_once(256)}
    constants = {"NORMALIZED": True, "E": 256, "K": 8}
    yield "choose", triton_sorting.choose, SORTING, constants, {"num_warps": 1}
    yield "count", triton_sorting.count, SORTING, sizes, {"num_warps": 8}
    for alone in (False, True):
        yield f"sort {alone}", triton_sorting.sort, SORTING, {**sizes, "ALONE": alone, "BLOCK_M": 64}, {"num_warps": 8}
    yield "add up", gpu.add_up, {"out": "*bf16", "parts": "*fp32", "weights": "*fp32"}, {"BLOCK": 1024}, {}
    types = {"out": "*bf16", "y": "*bf16", "x": "*bf16", "gate": "*bf16"}
    yield "add gated", gpu.gated_sum, types, {"BLOCK": 1024}, {}


def dense():
    for name, tile in tiles("dense", all_tokens=(1, 64, 128, 8192)):
        for gated in (True, False) if TARGET == "sm_90" else (True,):
            more = {"EVEN": True, "FEW": tile.is_few, "BLOCK_K": tile.block_k}
            yield f"dense {name} {gated}", triton_dense.multiply, *product(tile, gated, DENSE, **more)
    for name, tile in tiles("dense", 4, (1, 8192)):
        more = {"EVEN": True, "FEW": tile.is_few, "BLOCK_K": tile.block_k}
        wide = {**DENSE, "out": "*fp32", "x": "*fp32", "w": "*fp32"}
        yield f"dense float32 {name}", triton_dense.multiply, *product(tile, True, wide, **more)


def grouped():
    for name, tile in tiles("groups"):
        for bits, group, has_offset in ((4, 32, False), (4, 128, True), (8, 32, False))[: 3 if TARGET == "sm_90" else 2]:
            has_ptx, has_sums = TARGET != "gfx942", has_offset and not table.keeps_sums(tile)
            more = {
                "BITS": bits, "GROUP_SIZE": group, "LIFT": 136.0, **triton_groups.steps(group, 64),
                "HAS_OFFSET": has_offset, "HAS_COLUMNS": False, "HAS_SUMS": has_sums, "EVEN": True, "PTX": has_ptx,
                "HALF": 32,
            }  # fmt: skip
            yield f"int{bits} {name} {group}", triton_groups.multiply_groups, *product(tile, True, GROUPED, **more)


def eights():
    for name, tile in tiles("int8"):
        more = {"EVEN": True, "FEW": tile.is_few, "BLOCK_K": tile.block_k}
        yield f"int8 rows {name}", triton_eights.multiply_int8, *product(tile, True, INT8, **more)
    others = {"sm_80": fp8.BY_PTX, "gfx942": fp8.ANY_DEVICE}
    ways = (others[TARGET],) if TARGET in others else (fp8.AS_IT_IS, fp8.BY_E4M3)
    for name, tile in tiles("fp8"):
        more = {"EVEN": True, "FEW": tile.is_few, "BLOCK_K": tile.block_k, "HAS_X_SCALE": True}
        for way in ways:
            types = {**FP8, "x": "*fp8e4nv"} if way == fp8.AS_IT_IS else FP8
            made = product(tile, True, types, WAY=way, ONE_BLOCK=False, **more)
            yield f"fp8 {way} {name}", triton_eights.multiply_fp8, *made


def kernels():
    """Name, kernel, types of its pointers, constants and options."""
    for some in (sorting, dense, grouped, eights):
        yield from some()


if __name__ == "__main__":
    print(json.dumps({name: trouble(*given, *DEVICES[TARGET], multiples=EVEN) for name, *given in kernels()}))
