"""A trace of decode steps for a viewer, and what it says: how busy the device was, and how often the host waited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import Model
from llmd.engine.params import SamplingParams

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "hipStreamSynchronize", "hipDeviceSynchronize")
_STEPS = 6


def cases(setting: Setting) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    return {"decode": lambda: decode(setting)}


def decode(setting: Setting) -> dict[str, Any]:
    """Some steps of many rows, the last of them traced."""
    num_rows, context = (3, 20) if setting.is_tiny else (64, 512)
    model = Model(setting, num_rows, context + 32)
    model.admit(num_rows, context, SamplingParams(temperature=0.8, top_p=0.95, max_tokens=4096))
    plans = [model.plan(num_rows, context - 1 + step) for step in range(2 * _STEPS)]
    model.run(plans[:_STEPS])
    is_cuda = setting.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as found:
        model.run(plans[_STEPS:])
    found.export_chrome_trace(str(setting.folder / "trace.json.gz"))
    figures: dict[str, Any] = {"steps": _STEPS, "file": "trace.json.gz"}
    if is_cuda:
        figures |= device_use(found)
    return figures


def device_use(found: profile) -> dict[str, Any]:
    """The share of the time from the first kernel to the last in which none ran, and how often the host waited."""
    events = list(found.events() or ())
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    idle, reached = 0.0, spans[0][0] if spans else 0.0
    for start, end in spans:
        idle, reached = idle + max(0.0, start - reached), max(reached, end)
    whole = reached - spans[0][0] if spans else 0.0
    waits = sum(event.name in _WAITS for event in events)
    # One wait of `wait()` before the steps; a step's own end is an event's.
    return {"idle": round(idle / whole, 4) if whole else None, "kernels_a_step": len(spans) / _STEPS, "waits": waits}
