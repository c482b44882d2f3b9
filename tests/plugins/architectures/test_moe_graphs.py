"""Decode steps of mixtures of experts are recorded on a CPU, and give what the layers give one by one."""

from dataclasses import replace

import pytest
from model.step_driver import GREEDY, StepDriver, make_runner, model_parts
from model.tiny_models import make_model, prompts, save_model

from llmd.engine.params import SamplingParams
from llmd_kernels import native
from llmd_kernels.linear import ways
from llmd_plugins.architectures import moe

QWEN = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "hidden_size": 64}
MODELS = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40}),
    "qwen2-shared": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 36}),
    "qwen3": ("Qwen3Moe", {**QWEN, "norm_topk_prob": True}),
}


@pytest.fixture(scope="module", params=MODELS)
def path(request, tmp_path_factory):
    family, own = MODELS[request.param]
    return save_model(make_model(family, **own), tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def always_ours(monkeypatch):
    """Whatever this processor would be better served by."""
    if native.library() is None:
        pytest.skip("no compiler")
    for module in ("linear", "experts.cpu"):
        monkeypatch.setattr(f"llmd_kernels.{module}.max_rows", lambda: ways.ALL)


def driver(path, **model):
    given = model_parts()
    specs = {name: spec for spec in moe.llmd_register_architectures() for name in spec.architectures}
    parts = replace(given, architectures={**given.architectures, **specs})
    return StepDriver(make_runner(path, parts=parts, dtype="bfloat16", **model))


def generate(steps, params):
    """Rows that come one after another, and all their tokens."""
    running = []
    for length in (5, 9, 1, 17):
        sequence = steps.sequence(prompts(length, seed=length)[0], params)
        steps.step([(sequence, length), *((other, 1) for other in running)])
        running.append(sequence)
    for count in (4, 4, 4, 3, 3, 2, 4, 1):
        steps.step([(sequence, 1) for sequence in running[:count]])
    return [sequence.tokens for sequence in running]


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
def test_decode_steps_are_recorded(path, quantization, caplog):
    with caplog.at_level("INFO", logger="llmd.model"):
        recorded = driver(path, quantization=quantization)
        eager = driver(path, quantization=quantization, enforce_eager=True)
        for params in (GREEDY, SamplingParams(temperature=0.8, top_k=20, max_tokens=64, logprobs=2)):
            assert generate(recorded, params) == generate(eager, params)
    assert not [record.message for record in caplog.records if "not recorded" in record.message]
    assert {rows for rows, _ in recorded.runner._graphs._graphs} == {1, 2, 3, 4}
