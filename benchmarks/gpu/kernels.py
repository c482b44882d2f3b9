"""Kernels at a model's sizes: milliseconds, share of the device's ceiling, and how many times as fast as torch's own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import attention_kernels, sampling_kernels, token_kernels
from benchmarks.gpu.setting import Setting, Work, median_ms
from benchmarks.gpu.shapes import shape

Make = Callable[[Setting, dict[str, Any]], Work]


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    config = shape(setting.model, is_tiny=setting.is_tiny)
    made: dict[str, Make] = {**token_kernels.MAKE, **attention_kernels.MAKE, **sampling_kernels.MAKE}
    return {name: lambda make=make: measure(setting, config, make) for name, make in made.items()}  # type: ignore[misc]


@torch.inference_mode()
def measure(setting: Setting, config: dict[str, Any], make: Make) -> dict[str, Any]:
    """What a call costs, and shares."""
    work = make(setting, config)
    ms = median_ms(setting, work.ours)
    figures: dict[str, Any] = {"ms": round(ms, 4)}
    if work.num_bytes:
        figures |= {"gb_s": round(work.num_bytes / ms / 1e6, 1)}
        figures["of_copy"] = setting.share("copy_gb_s", work.num_bytes / ms / 1e6)
    if work.flops:
        figures |= {"tflop_s": round(work.flops / ms / 1e9, 2)}
        figures["of_matmul"] = setting.share("matmul_tflop_s", work.flops / ms / 1e9)
    if work.torch is not None:
        plain = median_ms(setting, work.torch)
        figures |= {"torch_ms": round(plain, 4), "times_torch": round(plain / ms, 2)}
    return figures
