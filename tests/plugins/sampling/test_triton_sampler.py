"""The plugin offers Triton's sampler to GPUs and torch's to all else, before torch's own."""

from importlib.util import find_spec

import pytest
import torch

from llmd.model.sampler import SamplerContext, TorchSampler
from llmd_plugins.sampling import torch as torch_plugin
from llmd_plugins.sampling import triton as plugin


def context(device):
    return SamplerContext(max_num_rows=1, max_model_len=8, vocab_size=10, device=torch.device(device))


def test_a_cpu_gets_the_torch_sampler():
    (spec,) = plugin.llmd_register_samplers()
    assert spec.name == "triton"
    assert type(spec.build(context("cpu"))) is TorchSampler
    assert spec.priority > torch_plugin.llmd_register_samplers()[0].priority


@pytest.mark.skipif(find_spec("triton") is None, reason="without Triton there is only torch's")
def test_a_gpu_gets_the_kernels(monkeypatch):
    from llmd.model import sampler_triton

    built = []
    monkeypatch.setattr(sampler_triton.TritonSampler, "__init__", lambda self, given: built.append(given))
    wanted = context("cuda")
    (spec,) = plugin.llmd_register_samplers()
    assert isinstance(spec.build(wanted), sampler_triton.TritonSampler)
    assert built == [wanted]


def test_a_gpu_without_triton_gets_the_torch_sampler(monkeypatch):
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    monkeypatch.setattr(TorchSampler, "__init__", lambda self, given: None)
    (spec,) = plugin.llmd_register_samplers()
    assert type(spec.build(context("cuda"))) is TorchSampler
