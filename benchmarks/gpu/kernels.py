"""Kernels at a model's sizes: milliseconds, share of the device's ceiling, and how many times as fast as torch's own way.

Each module `*_kernels.py` beside this one gives cases in MAKE; one that cannot be imported is a case that fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.setting import Setting, Uncapturable, Work, median_ms, wait
from benchmarks.gpu.shapes import shape

Make = Callable[[Setting, dict[str, Any]], Work]

_PROCESSES, _COMPILE_S = 8, 50.0
_FIRST = ("attention_kernels", "linear_kernels")


def modules() -> list[str]:
    """Their names, the most telling ones first."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*_kernels.py"))
    return [*(name for name in _FIRST if name in names), *(name for name in names if name not in _FIRST)]


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    config = shape(setting.model, is_tiny=setting.is_tiny)
    made, broken = all_cases()
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    if setting.device.type == "cuda":
        found["compile"] = lambda: compile_all(setting, list(made))
    for case, make in made.items():
        found[case] = lambda make=make: measure(setting, config, make)  # type: ignore[misc]
    for name, error in broken.items():
        found[name] = lambda error=error: _refuse(error)  # type: ignore[misc]
    return found


def all_cases() -> tuple[dict[str, Make], dict[str, Exception]]:
    """All cases, and the modules that could not be imported."""
    made: dict[str, Make] = {}
    broken: dict[str, Exception] = {}
    for name in modules():
        try:
            made |= import_module(f"benchmarks.gpu.{name}").MAKE
        except Exception as error:  # noqa: BLE001 - what one module lacks must not cost the others' cases
            broken[name] = error
    return made, broken


def compile_all(setting: Setting, names: list[str]) -> dict[str, Any]:
    """Call each case once in one of several processes: what they compile is found on disk afterwards."""
    pool = ProcessPoolExecutor(_PROCESSES, get_context("spawn"))
    futures = [pool.submit(call_once, setting, name) for name in names]
    end_s = time.monotonic() + _COMPILE_S
    try:
        wrong = [why for future in futures if (why := future.result(max(0.0, end_s - time.monotonic())))]
    except (BrokenProcessPool, TimeoutError) as error:
        wrong = [type(error).__name__]
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    return {"cases": len(names), "wrong": len(wrong), "first": wrong[0] if wrong else None}


@torch.inference_mode()
def call_once(setting: Setting, name: str) -> str:
    """In a compiling process: what is wrong with a case, empty if nothing."""
    try:
        all_cases()[0][name](setting, shape(setting.model, is_tiny=setting.is_tiny)).ours()
        wait(setting.device)
        torch.cuda.empty_cache()
    except Exception as error:  # noqa: BLE001 - the measuring process will meet it and write it down
        return f"{name}: {type(error).__name__}: {error}"[:300]
    return ""


def _refuse(error: Exception) -> dict[str, Any]:
    raise error


@torch.inference_mode()
def measure(setting: Setting, config: dict[str, Any], make: Make) -> dict[str, Any]:
    """What a call costs, and shares."""
    work = make(setting, config)
    ms = median_ms(setting, work.ours, as_graph=True)
    figures: dict[str, Any] = {"ms": round(ms, 4)}
    if work.num_bytes:
        figures |= {"gb_s": round(work.num_bytes / ms / 1e6, 1)}
        figures["of_copy"] = setting.share("copy_gb_s", work.num_bytes / ms / 1e6)
    if work.flops:
        figures |= {"tflop_s": round(work.flops / ms / 1e9, 2)}
        figures["of_matmul"] = setting.share("matmul_tflop_s", work.flops / ms / 1e9)
    if work.torch is not None:
        try:
            plain = median_ms(setting, work.torch, 5 if work.waits else 20, as_graph=not work.waits)
        except Uncapturable as error:
            error.figures = figures | {"torch": "no graph can hold its way"}
            raise
        figures |= {"torch_ms": round(plain, 4), "times_torch": round(plain / ms, 2)}
    return figures
