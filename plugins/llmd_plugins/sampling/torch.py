"""The sampler in plain torch: any device, one pass over all rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmd.api.v1 import SamplerSpec, hookimpl

if TYPE_CHECKING:
    from llmd.api.v1 import Sampler, SamplerContext


def _build(context: SamplerContext) -> Sampler:
    from llmd.api.v1 import TorchSampler

    return TorchSampler(context)


@hookimpl
def llmd_register_samplers() -> list[SamplerSpec]:
    return [SamplerSpec(name="torch", summary="All of SamplingParams in plain torch, on any device", build=_build)]
