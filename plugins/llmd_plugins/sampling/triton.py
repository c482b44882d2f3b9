"""The sampler in Triton kernels, for GPUs; the torch sampler's tokens, in a handful of launches."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from llmd.api.v1 import SamplerSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import Sampler, SamplerContext

_ABOVE_TORCH = 10


def _build(context: SamplerContext) -> Sampler:
    """Where there is no GPU, or no Triton for it, the torch sampler does the same."""
    if context.device.type == "cuda" and find_spec("triton") is not None:
        from llmd.api.v1 import TritonSampler

        return TritonSampler(context)
    from llmd.api.v1 import TorchSampler

    return TorchSampler(context)


@hookimpl
def llmd_register_samplers() -> list[SamplerSpec]:
    summary = "All of SamplingParams in Triton kernels; on a CPU, plain torch"
    return [SamplerSpec(name="triton", summary=summary, build=_build, priority=_ABOVE_TORCH)]
