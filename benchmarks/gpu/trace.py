"""A trace of decode steps for a viewer, and what it says: how busy the device was, and whether the host waited for it."""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import Model
from llmd.engine.params import SamplingParams

_WAITS = ("StreamSynchronize", "DeviceSynchronize", "CtxSynchronize", "hipMemcpy", "cudaMemcpy", "cuMemcpy")
_STEPS = 6
_LAUNCH = "llmd launch"
_NAME = "trace.json.gz"


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
    launch = model.runner.launch

    def marked(*given: Any) -> Any:
        with record_function(_LAUNCH):
            return launch(*given)

    model.runner.launch = marked  # type: ignore[method-assign,assignment]
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as found:
        model.run(plans[_STEPS:])
    events = export(found, setting.folder / "kept" / _NAME)
    return {"steps": _STEPS, "file": _NAME, **waits(events), **(device_use(events) if is_cuda else {})}


def export(found: profile, file: Path) -> list[dict[str, Any]]:
    """Write the trace, for a viewer, and give its events."""
    file.parent.mkdir(exist_ok=True)
    found.export_chrome_trace(str(file))
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [event for event in json.loads(content)["traceEvents"] if event.get("ph") == "X"]


def waits(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """How often the host waited for the device while it launched a step, and the first call that did."""
    events = list(events)
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == _LAUNCH)
    begins = [begin for begin, _ in spans]

    def is_within(at: float) -> bool:
        place = bisect_right(begins, at) - 1
        return place >= 0 and at <= spans[place][1]

    found = [
        event["name"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and _is_wait(event["name"]) and is_within(event["ts"])
    ]
    return {"launches": len(spans), "waits": len(found), "first": found[0] if found else None}


def _is_wait(name: str) -> bool:
    return any(word in name for word in _WAITS) and not name.endswith("Async")


def device_use(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the time from the first kernel to the last in which none ran: at all, and between two launches.

    The kernels of a replayed graph belong to one launch; a step has a few of these.
    """
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"], event.get("args", {}).get("correlation"))
        for event in events
        if event.get("cat") in ("kernel", "gpu_memset") or (event.get("cat") == "gpu_memcpy" and "DtoD" in event["name"])
    )
    if not spans:
        return {"idle": None, "idle_between": None, "kernels": 0}
    idle = between = 0.0
    reached, launch = spans[0][1], spans[0][2]
    for begin, end, of in spans:
        gap = max(0.0, begin - reached)
        idle, between = idle + gap, between + (gap if of is None or of != launch else 0.0)
        reached, launch = max(reached, end), of
    whole = reached - spans[0][0]
    return {"idle": round(idle / whole, 4), "idle_between": round(between / whole, 4), "kernels": len(spans)}
