"""Compiles a Triton kernel ahead of time and says what is wrong with it; for scripts of processes that do not interpret."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MAX_SPILLS = 64  # bytes a thread
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


def trouble(kernel, types, constants, options, target, shared, *, multiples=()):
    """Why a kernel is not fit for a target, in words; empty if it is. Arguments without a type are int32.

    `multiples` are those that are multiples of 16; addresses are.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(index,): constants[name] for index, name in enumerate(names) if name in constants}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants and (types.get(name, "").startswith("*") or name in multiples)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    built = triton.compile(source, target=target, options=options)
    found = []
    if built.metadata.shared > shared:
        found.append(f"{built.metadata.shared} bytes of shared memory, there are {shared}")
    if (spilled := spills(built, target)) > MAX_SPILLS:
        found.append(f"{spilled} bytes of registers spilled")
    return "; ".join(found)


def spills(built, target):
    """Bytes a thread."""
    if target.backend == "hip":
        return 4 * max(int(count) for count in re.findall(r"vgpr_spill_count: +(\d+)", built.asm["amdgcn"]))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    return max(int(count) for count in re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
