"""Which attention libraries are usable, what is told of the others, and when one goes before the Triton kernels."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from plugins.attention import library_fakes

from llmd.api.v1 import AttentionNeeds
from llmd.model.attention import select_backend
from llmd_kernels.paged_attention import libraries
from llmd_kernels.paged_attention.libraries import Phases, Speed
from llmd_plugins.attention import flash_attn, flashinfer, reference, torch_varlen, triton

NEEDS = AttentionNeeds(device="cuda", dtype="bfloat16", head_dim=128, num_heads=8, num_kv_heads=2, block_size=256)
SPECS = {
    spec.name: spec
    for plugin in (flash_attn, flashinfer, torch_varlen, triton, reference)
    for spec in plugin.llmd_register_attention_backends()
}
LIBRARIES = ("flash_attn", "flash_attn_3", "flashinfer", "torch_varlen")


@pytest.fixture
def installed(monkeypatch):
    """Where all of them can be imported."""
    library_fakes.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    return monkeypatch


def measure(monkeypatch, name, decode, prefill, device="sm_90"):
    monkeypatch.setitem(libraries._TABLE, (name, device, 128), Speed(decode, prefill))


def reasons(name, capability=(9, 0), releases=library_fakes.RELEASES, **change):
    with pytest.MonkeyPatch.context() as monkeypatch:
        library_fakes.install(monkeypatch, capability=capability, releases=releases)
        return SPECS[name].build().why_not(replace(NEEDS, **change))


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_each_serves(name):
    assert reasons(name) == []
    assert reasons(name, sliding_window=4096, kv_cache_dtype="bfloat16") == []
    assert reasons(name, dtype="float16", head_dim=64) == []


COMMON = {
    "only for GPUs, not cpu": {"device": "cpu"},
    "no dtype float32": {"dtype": "float32"},
    "no kv_cache_dtype fp8": {"kv_cache_dtype": "fp8"},
    "no kv_cache_dtype float16": {"kv_cache_dtype": "float16"},
    "no attention sinks": {"has_sinks": True},
}
OWN = [
    ("flash_attn", {"block_size": 16}, "block_size 16 is no multiple of 256: set block_size = 256"),
    ("flash_attn", {"head_dim": 100}, "head_dim 100 is no multiple of 8"),
    ("flash_attn", {"head_dim": 264}, "head_dim 264 is above 256"),
    ("flash_attn", {"capability": (7, 5)}, "needs sm_80 or newer, not sm_75"),
    ("flash_attn_3", {"capability": (8, 0)}, "needs sm_90 or newer, not sm_80"),
    ("flash_attn_3", {"capability": (10, 0)}, "needs sm_90 or older, not sm_100"),
    ("flash_attn_3", {"has_alibi": True}, "no ALiBi"),
    ("flashinfer", {"has_alibi": True}, "no ALiBi"),
    ("flashinfer", {"head_dim": 96}, "head_dim 96 is none of 64, 128, 256"),
    ("torch_varlen", {"block_size": 128}, "block_size 128 is no multiple of 256: set block_size = 256"),
    ("torch_varlen", {"soft_cap": 30.0}, "no soft cap"),
    ("torch_varlen", {"has_alibi": True}, "no ALiBi"),
]
EACH = [(name, change, reason) for name in LIBRARIES for reason, change in COMMON.items()]


@pytest.mark.parametrize(("name", "change", "reason"), EACH + OWN)
def test_why_not(name, change, reason):
    assert reasons(name, **change) == [reason]


@pytest.mark.parametrize(
    ("name", "distribution", "old", "least"),
    [
        ("flash_attn", "flash-attn", "2.5.9.post1", "2.6.0"),
        ("flash_attn_3", "flash_attn_3", "2.9", "3.0.0"),
        ("flashinfer", "flashinfer-python", "0.5.3", "0.6.0"),
        ("torch_varlen", "torch", "2.12.1+cu130", "2.13.0"),
    ],
)
def test_absent_and_old_releases_are_told_and_never_imported(name, distribution, old, least):
    without = {key: value for key, value in library_fakes.RELEASES.items() if key != distribution}
    told = f"{distribution} {old} is older than {least}"
    assert reasons(name, releases=without, block_size=16, has_sinks=True) == [f"{distribution} is not installed"]
    assert reasons(name, releases={**without, distribution: old}) == [told]
    for later in (least, f"{least}.b1", least.removesuffix(".0"), "10.0", f"{least}.post2+cu12torch2.13"):
        assert reasons(name, releases={**without, distribution: later}) == []


def test_what_is_missing_besides(installed, tmp_path):
    installed.setattr(flashinfer, "find_spec", lambda name: None)
    installed.setattr(flashinfer.shutil, "which", lambda name: None)
    installed.setattr(flashinfer, "_DEFAULT_HOME", str(tmp_path / "none"))
    installed.delenv("CUDA_PATH", raising=False)
    installed.setenv("CUDA_HOME", str(tmp_path))
    infer = SPECS["flashinfer"].build()
    assert infer.why_not(NEEDS) == ["neither flashinfer-jit-cache nor nvcc is installed, one of which its kernels come from"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert infer.why_not(NEEDS) == []
    installed.setattr("torch.nn.attention.current_flash_attention_impl", lambda: "FA3")
    own = SPECS["torch_varlen"].build()
    assert own.why_not(NEEDS) == ["torch's flash attention was replaced by FA3"]
    installed.setattr("torch.backends.cuda.is_flash_attention_available", lambda: False)
    assert own.why_not(NEEDS) == ["torch is built without flash attention"]
    installed.setattr("llmd.model.attention_library.find_spec", lambda name: None)
    assert infer.why_not(NEEDS) == ["triton is not installed, which stores and decodes"]
    installed.setattr(torch.version, "hip", "7.0")
    assert infer.why_not(NEEDS) == ["only for GPUs of NVIDIA"]


def test_none_goes_before_triton_until_it_was_measured(installed, caplog):
    caplog.set_level("INFO", "llmd.model")
    assert libraries._TABLE == {}
    assert select_backend(NEEDS, SPECS)[0] == "triton"
    assert "flash_attn_3: usable; not measured on sm_90" in caplog.text
    for name in LIBRARIES:
        assert select_backend(NEEDS, SPECS, name)[0] == name
    assert caplog.messages[-1] == "attention torch_varlen (not measured on sm_90)"
    measure(installed, "flashinfer", 0.0, 1.02)
    measure(installed, "flash_attn", 1.4, 1.1, "sm_80")
    assert select_backend(NEEDS, SPECS)[0] == "triton"
    assert "flashinfer: usable; times as fast as Triton on sm_90: prefill 1.02" in caplog.messages[-1]
    measure(installed, "flash_attn_3", 0.96, 1.31)
    assert select_backend(replace(NEEDS, head_dim=96), SPECS)[0] == "flash_attn_3"
    assert caplog.messages[-1].startswith(
        "attention flash_attn_3 (times as fast as Triton on sm_90: decode 0.96, prefill 1.31; not flash_attn: usable; not"
    )
    assert select_backend(replace(NEEDS, head_dim=64), SPECS)[0] == "triton"


def test_a_plan_for_a_gpu_that_is_not_here_takes_triton(installed, caplog):
    caplog.set_level("INFO", "llmd.model")
    installed.setattr(torch.cuda, "is_available", lambda: False)
    installed.delattr(torch.cuda, "get_device_properties")
    measure(installed, "flash_attn_3", 2.0, 2.0)
    assert select_backend(NEEDS, SPECS)[0] == "triton"
    assert "flash_attn_3: usable; not measured, for no GPU is here" in caplog.text


def test_phases_and_widths():
    assert libraries.phases(None) == libraries.phases(Speed(1.02, 0.5)) == Phases(decode=False, prefill=True)
    assert libraries.phases(Speed(1.5, 0.5)) == Phases(decode=True, prefill=False)
    assert [libraries.padded(dim) for dim in (16, 80, 96, 128, 129)] == [16, 128, 128, 128, 256]
