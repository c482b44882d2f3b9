"""Compiles Triton kernels ahead of time and says what is wrong with them; for scripts of processes that do not interpret."""

import contextlib
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor

MAX_SPILLS = 64  # bytes a thread
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def trouble(kernel, types, constants, options, target, shared, *, multiples=()):
    """Why a kernel is not fit for a target, in words; empty if it is. Arguments without a type are int32.

    `multiples` are those that are multiples of 16; addresses are.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(index,): constants[name] for index, name in enumerate(names) if name in constants}
    small = [["tt.pointer_range", 32]] if target.backend == "hip" else []  # tensors below 2 GiB: other instructions
    aligned = {
        (index,): [["tt.divisibility", 16], *(small if types.get(name, "").startswith("*") else [])]
        for index, name in enumerate(names)
        if name not in constants and (types.get(name, "").startswith("*") or name in multiples)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return unfit(triton.compile(source, target=target, options=options), target, shared)


def unfit(built, target, shared):
    """Why compiled code is not fit for a target, in words; empty if it is."""
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
    return max(int(count) for count in re.findall(r"(?:STACK|LOCAL):(\d+)", usage(built)))


def usage(built):
    """cuobjdump's line on a kernel's registers and memory."""
    return _tool("cuobjdump", "-res-usage", built)


def _tool(name, option, built):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        done = subprocess.run([TOOLS / name, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


class Launch(NamedTuple):
    """A launch that was compiled instead."""

    name: str
    grid: tuple[int, ...]
    built: Any


class _Driver:
    """Triton's, for a device that is only compiled for."""

    def __init__(self, target):
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return list(TARGETS.values()).index(next(known for known in TARGETS.values() if known[0] == self._target))

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def launches(target):
    """What wrappers launch meanwhile, wherever the tensors are, is compiled for a target with the very same arguments."""
    made, run = [], JITFunction.run

    def launch(self, *args, grid, warmup=False, **options):
        args = [MockTensor(arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]
        made.append(Launch(self.fn.__name__, grid, run(self, *args, grid=grid, warmup=True, **options)))

    before = driver._active
    driver.set_active(_Driver(target))
    try:
        with mock.patch.object(JITFunction, "run", launch):
            yield made
    finally:
        driver.set_active(before)


def facts(built):
    """What a kernel for a Hopper GPU takes, and how often each instruction stands in its longest innermost loop of products.

    Loads and stores of memory are counted by width: "LDGSTS.128".
    """
    registers = int(re.search(r"REG:(\d+)", usage(built)).group(1))
    code, loops = disassembled(built)
    hot = max((code[start : end + 1] for start, end in loops if _has_products(code, start, end, loops)), key=len, default=[])
    return {
        "registers": registers, "shared": built.metadata.shared, "warps": built.metadata.num_warps,
        "programs": programs(registers, built.metadata.num_warps, built.metadata.shared), "loop": _counts(hot),
        "code": _counts(code), "atomics": [_around(code, at) for at, text in enumerate(code) if text.startswith("ATOMG")],
    }  # fmt: skip


def _around(code, at):
    """The names of instructions before and after one."""
    return [[text.split(None, 1)[0] for text in some] for some in (code[max(at - 24, 0) : at], code[at + 1 : at + 5])]


def programs(registers, warps, shared):
    """How many programs of such a kernel a multiprocessor of a Hopper GPU holds."""
    by_registers = 65536 // (warps * 32 * (math.ceil(registers / 8) * 8))
    return min(by_registers, (228 << 10) // (math.ceil((shared + 1024) / 128) * 128), 64 // warps, 32)


def disassembled(built):
    """Instructions without predicates, and the loops among them: first and last index."""
    code, labels, jumps = [], {}, []
    for line in _tool("nvdisasm", "-c", built).splitlines():
        if found := re.match(r"\s*(\.L_\w+):", line):
            labels[found.group(1)] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]*)", line):
            if target := re.search(r"BRA.*`\((\.L_\w+)\)", found.group(1)):
                jumps.append((len(code), target.group(1)))
            code.append(found.group(1))
    return code, [(labels[label], at) for at, label in jumps if label in labels and labels[label] < at]


def _has_products(code, start, end, loops):
    """Whether a loop multiplies matrices and has no loop inside."""
    is_innermost = not any(start <= first and last < end for first, last in loops)
    return is_innermost and any("MMA" in instruction.split(None, 1)[0] for instruction in code[start : end + 1])


def _counts(code):
    counts: dict[str, int] = {}
    for instruction in code:
        name, *parts = instruction.split(None, 1)[0].split(".")
        width = next((part for part in parts if part in ("U8", "S8", "U16", "S16", "64", "128")), None)
        key = f"{name}.{width}" if width and name in ("LDG", "LDGSTS", "STG", "LDS", "STS", "LDL", "STL") else name
        counts[key] = counts.get(key, 0) + 1
    return counts
