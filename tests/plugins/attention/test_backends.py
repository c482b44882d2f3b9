"""The cached backends: what each serves and why not, and that a backend may turn and store heads in one call."""

from dataclasses import replace

import pytest
import torch
from model.step_driver import StepDriver, make_runner, model_parts
from model.tiny_models import make_model, prompts, save_model

from llmd.api.v1 import AttentionExtras, AttentionNeeds
from llmd.api.v1.testing.attention import check_attention_backend
from llmd.model.attention import select_backend
from llmd.model.layers import Attention
from llmd_plugins.attention import cpu, reference, triton

NEEDS = AttentionNeeds(device="cuda", dtype="bfloat16", head_dim=128, num_heads=8, num_kv_heads=2, block_size=16)
SPECS = {
    spec.name: spec for plugin in (cpu, reference, triton) for spec in plugin.llmd_register_attention_backends()
}  # fmt: skip


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_they_keep_the_contract(name):
    check_attention_backend(SPECS[name].build(), num_cases=10)


def test_a_gpu_takes_triton_and_a_cpu_its_own():
    assert select_backend(NEEDS, SPECS)[0] == "triton"
    assert select_backend(replace(NEEDS, device="cpu"), SPECS)[0] == "cpu"
    assert select_backend(replace(NEEDS, head_dim=512), SPECS)[0] == "reference"
    extras = {"soft_cap": 50.0, "has_sinks": True, "has_alibi": True}
    for kv_cache_dtype in ("auto", "int8", "fp8"):
        assert select_backend(replace(NEEDS, kv_cache_dtype=kv_cache_dtype, **extras), SPECS)[0] == "triton"


def test_the_choice_is_told_with_its_reasons(caplog):
    with caplog.at_level("INFO", "llmd.model"):
        select_backend(replace(NEEDS, device="cpu"), SPECS)
    assert caplog.messages == ["attention cpu (not triton: only for GPUs, not cpu)"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "only for GPUs, not cpu"),
        ({"head_dim": 257}, "head_dim 257 is above 256"),
        ({"dtype": "float64"}, "no dtype float64"),
        ({"kv_cache_dtype": "int4"}, "no kv_cache_dtype int4"),
    ],
)
def test_why_triton_does_not_serve(change, reason, monkeypatch):
    assert SPECS["triton"].build().why_not(replace(NEEDS, **change)) == [reason]


def test_old_gpus_and_a_missing_compiler_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert triton.TritonAttention().why_not(NEEDS) == ["needs sm_80 or newer, not sm_75"]
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert triton.TritonAttention().why_not(NEEDS) == ["triton is not installed"]


class Separate(cpu.CpuAttention):
    """The CPU's, handed heads that are normalised and turned already."""

    turns_heads = False


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_backend_that_turns_heads_gives_the_same(tmp_path, family):
    path = save_model(make_model(family), tmp_path)
    found = []
    for backend in (None, Separate()):
        runner = make_runner(path)
        for module in runner.model.module.modules():
            if backend is not None and isinstance(getattr(module, "attend", None), Attention):
                module.attend.backend = backend
        driver = StepDriver(runner)
        sequence = driver.sequence(prompts(30)[0])
        for _ in range(5):
            driver.step([(sequence, len(sequence.tokens) - sequence.computed)])
        found.append((sequence.tokens, runner.kv.pool.clone()))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_extras_of_a_layer_reach_the_kernel(name):
    """A soft cap so low that all scores are equal: the mean of the values."""
    backend, parts = SPECS[name].build(), model_parts()
    assert name in parts.attention_backends
    from llmd.api.v1.testing.paged import PagedRows

    rows = PagedRows((9,), block_size=4)
    kv = rows.pool(backend.kv_shape(4, 1, 8), torch.float32)
    q, k, v = torch.randn(9, 2, 8), torch.randn(9, 1, 8), torch.randn(9, 1, 8)
    batch = replace(rows.batch([0], [9]), kv=(kv,))
    batch = replace(batch, attention=backend.prepare(batch))
    layer = Attention(backend, 0, 1.0, None, AttentionExtras(soft_cap=1e-4))
    torch.testing.assert_close(layer(q, k, v, batch)[-1].view(2, 8), v.mean(0).expand(2, 8), rtol=1e-3, atol=1e-3)
    layer.extras = AttentionExtras(sinks=torch.full((2,), 80.0))
    assert layer(q, k, v, batch).abs().max() < 1e-6
