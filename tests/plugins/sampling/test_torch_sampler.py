"""The plugin offers the core's sampler."""

import torch

from llmd.model.sampler import SamplerContext, TorchSampler
from llmd_plugins.sampling import torch as plugin


def test_the_spec_builds_the_sampler():
    (spec,) = plugin.llmd_register_samplers()
    assert spec.name == "torch"
    context = SamplerContext(max_num_rows=1, max_model_len=8, vocab_size=10, device=torch.device("cpu"))
    assert isinstance(spec.build(context), TorchSampler)
