"""What kernels are compiled for: a GPU's generation and how many processors it has. Loads no torch, starts no context."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import NamedTuple

from llmd.errors import ConfigError

# Processors of the GPUs that are common in servers (NVIDIA's and AMD's data sheets): grids and splits hang on them.
_PROCESSORS = {
    "sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_103": 160, "sm_120": 188,
    "gfx90a": 104, "gfx942": 304, "gfx950": 256,
}  # fmt: skip
_NAME = re.compile(r"(?:sm_([0-9]{2,3})|(gfx[0-9a-f]{3,4}))(?::([0-9]{1,4}))?")
_KFD = Path("/sys/class/kfd/kfd/topology/nodes")
_MAJOR, _MINOR, _NUM_PROCESSORS = 75, 76, 16  # CUdevice_attribute of the CUDA driver API


class GpuTarget(NamedTuple):
    """`name` as compilers spell it: sm_90, gfx942."""

    name: str
    num_processors: int

    @property
    def backend(self) -> str:
        """Triton's: cuda or hip."""
        return "hip" if self.name.startswith("gfx") else "cuda"

    @property
    def capability(self) -> tuple[int, int]:
        """(9, 0) of sm_90; of gfx942 (9, 4)."""
        digits = self.name[3:]
        return (int(digits[:-1]), int(digits[-1])) if self.backend == "cuda" else (int(digits[:-2]), int(digits[-2], 16))

    @property
    def arch(self) -> int | str:
        """Triton's: 90, "gfx942"."""
        return self.name if self.backend == "hip" else int(self.name[3:])

    @property
    def warp_size(self) -> int:
        """Threads that go together."""
        return 64 if self.name.startswith("gfx9") else 32

    def __str__(self) -> str:
        return f"{self.name}:{self.num_processors}"


def parse_target(text: str) -> GpuTarget:
    """A target from "sm_90", "gfx942", or with its number of processors "sm_90:114". Raises ConfigError."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise ConfigError(f"--device: {text!r} is no GPU; write one such as sm_90, gfx942, or sm_90:114 with its processors")
    name = text.partition(":")[0]
    if match[3] is None and name not in _PROCESSORS:
        raise ConfigError(f"--device: write {name}:N, N its multiprocessors; known without are {', '.join(_PROCESSORS)}")
    return GpuTarget(name, int(match[3] or _PROCESSORS[name]))


def find_target(index: int = 0) -> GpuTarget | None:
    """The machine's GPU; None where there is none, or none that tells what it is."""
    return _nvidia(index) or _amd(index)


def _nvidia(index: int) -> GpuTarget | None:
    """Asks the driver, which makes no context for this."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, number = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    found = []
    for attribute in (_MAJOR, _MINOR, _NUM_PROCESSORS):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
        found.append(number.value)
    return GpuTarget(f"sm_{found[0]}{found[1]}", found[2])


def _amd(index: int, nodes: Path = _KFD) -> GpuTarget | None:
    """Reads what the kernel tells of each GPU (linux, drivers/gpu/drm/amd/amdkfd/kfd_topology.c)."""
    found = []
    for node in sorted(nodes.glob("*/properties"), key=lambda path: path.parent.name.zfill(8)):
        try:
            lines = node.read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            continue
        facts = {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value.isdigit()}
        version, per_processor = facts.get("gfx_target_version", 0), facts.get("simd_per_cu", 0)
        if version and per_processor:
            major, minor, stepping = version // 10000, version // 100 % 100, version % 100
            found.append(GpuTarget(f"gfx{major}{minor:x}{stepping:x}", facts.get("simd_count", 0) // per_processor))
    return found[index] if index < len(found) else None
