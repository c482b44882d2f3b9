"""What kernels ask of the device that they are cut for."""

from __future__ import annotations

from functools import cache

import torch


def device_name(device: torch.device) -> str:
    """As compilers name it: sm_90, gfx942; cpu where there is none."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
