"""Compiles the quantized products' Triton kernels ahead of time; prints which did, within shared memory and spills."""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmd_kernels.fp8_linear import tiles as fp8_tiles
from llmd_kernels.fp8_linear import triton as fp8
from llmd_kernels.grouped_linear import tiles as grouped_tiles
from llmd_kernels.grouped_linear import triton as grouped
from llmd_kernels.int8_linear import tiles as int8_tiles
from llmd_kernels.int8_linear import triton as int8

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
MOST_SPILLS = 64  # bytes a thread, or registers on AMD
FLOATS = {"factor"}


def blocks(tile, **more):
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n} | more, {"num_warps": tile.warps, "num_stages": tile.stages}


def cases(target):
    """Name, kernel, types of its pointers, constants and options."""
    types = {"out": "*bf16", "x": "*bf16", "w": "*u8", "scale": "*fp16", "offset": "*fp16", "bias": "*bf16"}
    for rows, bits, has_offset in ((1, 4, True), (64, 8, True), (4096, 4, True), (4096, 4, False)):
        tile = grouped_tiles.tile_for(rows, 4096, 64)
        more = {"BITS": bits, "EVEN": True, "HAS_OFFSET": has_offset, "HAS_BIAS": True, "SPLIT": tile.split, "HALF": 32}
        out = {"out": "*fp32"} if tile.split > 1 else {}
        yield f"grouped {bits} {has_offset} {rows}", grouped.multiply, types | out, *blocks(tile, **more)
    parts = {"out": "*bf16", "parts": "*fp32", "bias": "*bf16"}
    yield "add up", grouped.add_up, parts, {"HAS_BIAS": True, "SPLIT": 8, "BLOCK_N": 1024}, {}
    types = {"out": "*bf16", "x": "*bf16", "w": "*u8", "w_scale": "*fp32", "x_scale": "*fp32", "bias": "*bf16"}
    all_rows = (1, 64, 4096) if target == "sm_90" else (1, 4096)  # the rest differs in little, and takes its time
    for rows in all_rows:
        for native in (False, True) if target == "sm_90" else (False,):
            x = {"x": "*fp8e4nv"} if native else {}
            more = {"HAS_X_SCALE": native, "HAS_BIAS": True, "NATIVE": native, "BLOCK_K": fp8_tiles.BLOCK_K}
            yield f"fp8 {native} {rows}", fp8.multiply, types | x, *blocks(fp8_tiles.tile_for(rows), **more)
    types = {
        "out": "*bf16",
        "x": "*i8",
        "w": "*i8",
        "w_scale": "*fp32",
        "x_scale": "*fp32",
        "w_sum": "*i32",
        "bias": "*fp32",
    }
    for rows in all_rows:
        tile = int8_tiles.tile_for(rows)
        yield f"int8 {rows}", int8.multiply, types, *blocks(tile, HAS_BIAS=True, BLOCK_K=tile.block_k)
    types = {"out": "*i8", "scale": "*fp32", "x": "*bf16", "given": "*fp32"}
    yield "quantize", int8.quantize, types, {"HAS_GIVEN": False, "BLOCK": 1024}, {}


def spills(built):
    """Bytes of a thread's local memory on NVIDIA, vector registers on AMD."""
    if "amdgcn" in built.asm:
        return max(int(count) for count in re.findall(r"vgpr_spill_count: +(\d+)", str(built.asm["amdgcn"])))
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([cuobjdump, "-res-usage", file.name], text=True)
    return max(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


def why_not(target, shared, kernel, types, constants, options):
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "fp32" if name in FLOATS else "i32") for name in names
    }
    values = {(index,): constants[name] for index, name in enumerate(names) if name in constants}
    even = {*types, "depth", "width", "x_stride", "columns"}  # as the launcher finds models' sizes
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in even}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    built = triton.compile(source, target=target, options=options)
    if built.metadata.shared > shared:
        return f"{built.metadata.shared} bytes of shared memory"
    return f"{spills(built)} spilled" if spills(built) > MOST_SPILLS else None


names = [os.environ["LLMD_TEST_TARGET"]]
print(
    json.dumps({f"{target} {name}": why_not(*TARGETS[target], *case) for target in names for name, *case in cases(target)})
)
