"""What the device can do at most, measured: every other figure is a share of these."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu.host import lacking
from benchmarks.gpu.setting import Setting, median_ms


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    return {"host": lambda: host(setting), "copy": lambda: copy(setting), "matmul": lambda: matmul(setting)}


def host(setting: Setting) -> dict[str, Any]:
    """Where this runs."""
    import triton

    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    facts["lacking"] = ", ".join(lacking()) or None
    facts |= {name: metadata.version(name) for name in ("transformers", "numpy") if name not in lacking()}
    if setting.device.type == "cuda":
        found = torch.cuda.get_device_properties(setting.device)
        facts |= {
            "gpu": found.name,
            "memory_gb": round(found.total_memory / 1e9, 1),
            "processors": found.multi_processor_count,
        }
    return facts


def copy(setting: Setting) -> dict[str, Any]:
    """Bytes read and written a second, by the largest copy."""
    size = 1 << 20 if setting.is_tiny else 2 << 30
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    ms = median_ms(setting, lambda: target.copy_(source), 30)
    return {"ms": round(ms, 4), "copy_gb_s": round(2 * size / ms / 1e6, 1)}


def matmul(setting: Setting) -> dict[str, Any]:
    """Operations a second of bfloat16 products with random data: zeros draw less power and run faster."""
    size = 64 if setting.is_tiny else 8192
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    ms = median_ms(setting, lambda: a @ b, 30)
    return {"ms": round(ms, 4), "matmul_tflop_s": round(2 * size**3 / ms / 1e9, 3)}
