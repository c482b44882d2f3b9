"""Which attention backend is taken, and what is said when none can be."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from model.step_driver import make_runner, model_parts
from model.tiny_models import make_model, save_model

from llmd.errors import ModelError
from llmd.model.attention import AttentionNeeds, select_backend

NEEDS = AttentionNeeds(device="cpu", dtype="float32", head_dim=64, num_heads=4, num_kv_heads=2, block_size=16)


def spec(priority, *reasons):
    return SimpleNamespace(priority=priority, build=lambda: SimpleNamespace(why_not=lambda needs: list(reasons)))


SPECS = {"slow": spec(0), "fast": spec(5), "best": spec(9, "no float32", "only for GPUs")}


def test_the_usable_one_of_highest_priority():
    assert select_backend(NEEDS, SPECS)[0] == "fast"


def test_the_configs_name_counts():
    assert select_backend(NEEDS, SPECS, "slow", lambda needs, usable: "fast")[0] == "slow"


def test_a_hook_may_choose_among_the_usable():
    seen = []
    assert select_backend(NEEDS, SPECS, select=lambda needs, usable: seen.append(usable) or "slow")[0] == "slow"
    assert seen == [["fast", "slow"]]
    assert select_backend(NEEDS, SPECS, select=lambda needs, usable: None)[0] == "fast"
    with pytest.raises(ModelError, match="'best'; usable are fast, slow"):
        select_backend(NEEDS, SPECS, select=lambda needs, usable: "best")


def test_a_named_one_that_cannot_says_why():
    with pytest.raises(ModelError, match="best: no float32, only for GPUs"):
        select_backend(NEEDS, SPECS, "best")
    with pytest.raises(ModelError, match="'other' is not known; known are best, fast, slow"):
        select_backend(NEEDS, SPECS, "other")
    with pytest.raises(ModelError, match="none is loaded"):
        select_backend(NEEDS, {})


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_built_in_reasons(name):
    backend = model_parts().attention_backends[name].build()
    for served in ("auto", "int8", "fp8"):
        assert backend.why_not(replace(NEEDS, kv_cache_dtype=served, soft_cap=30.0, has_sinks=True, has_alibi=True)) == []
    reasons = " ".join(backend.why_not(replace(NEEDS, device="cuda", kv_cache_dtype="int4")))
    assert "no kv_cache_dtype int4" in reasons
    assert ("only for CPUs" in reasons) == (name == "cpu")
    assert backend.kv_shape(16, 2, 64) == (2, 16, 2, 64)


def test_unknown_architectures_and_devices(tmp_path):
    path = save_model(make_model("Llama"), tmp_path)
    with pytest.raises(ModelError, match="device must be"):
        make_runner(path, device="tpu")
    with pytest.raises(ModelError, match="device 'cuda:99' is not there"):
        make_runner(path, device="cuda:99")
    text = (path / "config.json").read_text().replace("LlamaForCausalLM", "ZetaForCausalLM")
    (path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"ZetaForCausalLM is not known; known are LlamaForCausalLM, .*plugin wheel"):
        make_runner(path)
