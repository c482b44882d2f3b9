"""Up to how many rows of x the C++ kernel is faster than torch, by what the processor has.

Times as fast as `F.linear`, which packs W at each call, on two cores of Zen 4 over the linears of a 0.5B Qwen2. The rows
below the first were read with oneDNN and the compiler held to the older instructions.

| instructions  | 1 row | 4   | 16  | 64  | 256  | 1,024 |
|---------------|-------|-----|-----|-----|------|-------|
| AVX-512, BF16 | 1.7   | 1.7 | 1.7 | 1.2 | 1.05 | 1.03  |
| AVX-512       | 1.5   | 3.8 | 2.9 | 2.6 | 2.9  |       |
| AVX2          | 0.15  | 0.4 | 0.4 | 0.5 | 0.5  |       |

AMX does sixteen times the work of an AVX-512 instruction, and only oneDNN uses it: it wins as soon as a product is bound
by work instead of memory. Other processors have not been measured: torch serves them.
"""

from __future__ import annotations

import functools

import torch

ALL = 1 << 62


@functools.cache
def max_rows() -> int:
    """For this processor."""
    return choose(
        has_amx=bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()),
        capability=torch.backends.cpu.get_cpu_capability(),
    )


def choose(*, has_amx: bool, capability: str) -> int:
    """For a processor whose vectors torch names so."""
    if has_amx:
        return 8
    return ALL if capability.startswith("AVX512") else 0
