"""Compiles the Triton kernels ahead of time and prints for each target which of them did, within its shared memory."""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmd_kernels.lora import triton as kernels

TYPES = {
    "hidden": "*fp32", "x": "*bf16", "y": "*bf16", "a": "*bf16", "b": "*bf16", "ranks": "*i32", "tokens": "*i32",
    "starts": "*i32", "part_starts": "*i32",
}  # fmt: skip
BLOCKS = {"SPLIT": 8, "BLOCK_M": 16, "BLOCK_K": 64, "BLOCK_N": 128, "BLOCK_R": 64, "BLOCKS": 7}
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


def compiles(kernel, target, shared):
    """Whether a kernel compiles for a target without spilling registers."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in BLOCKS else TYPES.get(name, "i32") for name in names}
    constants = {(index,): BLOCKS[name] for index, name in enumerate(names) if name in BLOCKS}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in TYPES}
    built = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned), target=target)
    spills = [int(count) for count in re.findall(r"vgpr_spill_count: +(\d+)", str(built.asm.get("amdgcn", "")))]
    return built.metadata.shared <= shared and not any(spills)


print(
    json.dumps(
        {
            name: {kernel.fn.__name__: compiles(kernel, *target) for kernel in (kernels.shrink, kernels.expand)}
            for name, target in TARGETS.items()
        }
    )
)
