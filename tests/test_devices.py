"""`llmd check --device` on a machine with a GPU and attention libraries, as far as it asks for them."""

from types import SimpleNamespace

import pytest
import torch
from plugins.attention import library_fakes

from llmd.config import Config, PluginsConfig
from llmd.devices import describe_devices
from llmd.plugin.catalog import build_catalog
from llmd_kernels.paged_attention import libraries
from llmd_kernels.paged_attention.libraries import Speed


@pytest.fixture
def described(monkeypatch):
    """The lines for the demo model, by backend."""
    library_fakes.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    catalog = build_catalog(PluginsConfig(autoload=False))

    def describe(block_size, **model):
        config = Config.model_validate(
            {"cache": {"block_size": block_size}, "models": [{"model": "demo", "device": "cuda", **model}]}
        )
        head, *lines = describe_devices(config, catalog)
        assert head == "demo: cuda:0, bfloat16, 4 heads of 64, 2 for KV"
        return dict(line.strip().removeprefix("attention ").split(": ", 1) for line in lines)

    return describe


def test_each_library_says_what_to_set_or_that_nobody_measured_it(described):
    unmeasured = "usable; not measured on sm_90"
    assert described(16) == {
        "triton": "taken",
        "cpu": "only for CPUs, not cuda",
        "flash_attn": "block_size 16 is no multiple of 256: set block_size = 256",
        "flash_attn_3": unmeasured,
        "flashinfer": unmeasured,
        "torch_varlen": "block_size 16 is no multiple of 256: set block_size = 256",
        "reference": "usable, another goes before it",
    }
    assert described(256)["flash_attn"] == unmeasured
    assert described(16, attention_backend="flash_attn_3")["flash_attn_3"] == "taken; not measured on sm_90"


def test_a_measurement_puts_a_library_first_and_is_told(described, monkeypatch):
    monkeypatch.setitem(libraries._TABLE, ("flash_attn_3", "sm_90", 64), Speed(1.1, 1.25))
    lines = described(16)
    assert lines["flash_attn_3"] == "taken; times as fast as Triton on sm_90: decode 1.10, prefill 1.25"
    assert lines["triton"] == "usable, another goes before it"
