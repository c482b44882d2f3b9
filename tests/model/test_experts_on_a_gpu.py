"""Experts on a GPU that computes nothing: they lie in one tensor, and no step with them waits for the device."""

import logging

import pytest
import torch
from model.fake_cuda import fake_cuda
from model.tiny_models import make_model, save_model

from llmd.api.v1.testing.driver import installed_parts
from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.params import SamplingParams
from llmd.engine.step import BlockUpdate, RowAdmit, StepPlan
from llmd.model.layers import Experts
from llmd.model.quantization import Unquantized
from llmd.model.runner import Runner
from llmd_kernels.experts import ExpertWeights, Fp8Weight, Stack, experts, route, why_not
from llmd_kernels.grouped_linear import GroupedWeight
from llmd_kernels.int8_linear import Int8Weight

pytest.importorskip("triton")

SHAPE = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "hidden_size": 128}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(make_model("Mixtral", **SHAPE), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def machine(path):
    with fake_cuda(compiles=True) as device:
        yield device, make_runner(path)


def make_runner(path):
    runner = Runner(
        ModelConfig(model=str(path), dtype="bfloat16", device="cuda"),
        CacheConfig(block_size=4, kv_cache_bytes=8 << 20),
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
        path,
        installed_parts(),
    )
    runner.load(lambda progress: None)
    return runner


def step(runner, count):
    """Three rows of `count` tokens each."""
    params = SamplingParams(temperature=0.0, max_tokens=9)
    ids = tuple(range(count))
    admits = [
        RowAdmit(row=row, seq_id=row, request_id="", token_ids=ids, num_prompt_tokens=count, params=params, seed=row)
        for row in range(3)
    ]
    blocks = [BlockUpdate(row, 0, 0, range(4 * row, 4 * row + 4)) for row in range(3)]
    plan = StepPlan(
        step_id=1, admitted=admits, block_updates=blocks, rows=[0, 1, 2], starts=[0, 0, 0], counts=[count] * 3,
        num_logits=[1] * 3, samples=[True] * 3,
    )  # fmt: skip
    return runner.launch(plan)


def test_a_step_waits_for_nothing(machine):
    device, runner = machine
    num_layers = runner.model.config.num_layers
    device.clear()
    pending = step(runner, 9)
    assert device.waits == []
    for kernel, times in (("sort", 1), ("multiply", 2), ("add_up", 1)):
        assert device.launches.count(kernel) == times * num_layers
    assert len(pending.result().token_ids) == 3


def packed(form, width, depth):
    """As methods keep it on a GPU."""
    whole = {"device": "cuda", "dtype": torch.uint8}
    if form == "int8":
        sums = torch.empty(width, device="cuda", dtype=torch.int32)
        return Int8Weight(
            torch.empty(width, depth, device="cuda").to(torch.int8), torch.empty(width, device="cuda"), sums, depth
        )
    if form == "int4":
        scale = torch.empty(depth // 32, width, device="cuda", dtype=torch.float16)
        chunks = torch.empty(depth // 64, width, 32, **whole)
        return GroupedWeight(chunks, scale, None, None, 4, 32, 8, depth, width, 1.0, "chunks")
    weight = torch.empty(width, depth, device="cuda", dtype=torch.float8_e4m3fn)
    if form == "fp8 by blocks":
        return Fp8Weight(weight, torch.empty(width // 128, depth // 128, device="cuda"), (128, 128), "group", None)
    return Fp8Weight(weight, torch.empty(width, device="cuda"), None, "tensor", torch.empty(1, device="cuda"))


@pytest.mark.parametrize(
    ("form", "kernel"),
    [
        ("int8", "multiply_int8"), ("int4", "multiply_groups"), ("fp8 by blocks", "multiply_fp8"), ("fp8", "multiply_fp8"),
    ],
)  # fmt: skip
def test_packed_experts_wait_for_nothing(machine, form, kernel):
    device, _ = machine
    found = []
    for width, depth in ((256, 128), (128, 128)):
        stack, each = Stack(3), [packed(form, width, depth) for _ in range(3)]
        for number, weight in enumerate(each):
            stack.take(number, weight)
        found.append(ExpertWeights(each, stack.weight))
    assert why_not(*found, torch.device("cuda")) is None
    x, logits = (torch.empty(5, size, device="cuda", dtype=torch.bfloat16) for size in (128, 3))
    device.clear()
    ids, weights = route(logits, 2, normalized=True)
    assert experts(x, ids, weights, *found).shape == (5, 128)
    assert device.waits == []
    assert (device.launches.count(kernel), device.launches.count("choose")) == (2, 1)


def test_experts_lie_in_one_tensor_and_are_held_once(machine):
    _, runner = machine
    module = runner.model.module
    for mixture in (part for part in module.modules() if isinstance(part, Experts)):
        gate_up, down = mixture._weights
        assert gate_up.stacked.shape == (4, 128, 128)
        assert down.stacked.shape == (4, 128, 64)
        for number, expert in enumerate(mixture):
            for linear, whole in ((expert.gate_up, gate_up.stacked), (expert.down, down.stacked)):
                assert linear.weight.untyped_storage()._cdata == whole.untyped_storage()._cdata
                assert linear.weight.storage_offset() == number * linear.weight.numel()
    params = sum(parameter.numel() for parameter in make_model("Mixtral", **SHAPE).parameters())
    assert runner.model.weights_bytes == 2 * params


def test_formats_without_a_kernel_go_through_every_expert_and_say_so(machine, path, monkeypatch, caplog):
    monkeypatch.delattr(Unquantized, "expert_weight")
    device, _ = machine
    with caplog.at_level(logging.WARNING, "llmd.model"):
        runner = make_runner(path)
        device.clear()
        step(runner, 3)
    assert device.waits == []
    assert "sort" not in device.launches
    said = [record.getMessage() for record in caplog.records if "every expert" in record.getMessage()]
    assert said == ["every token goes through every expert, which is slow: Unquantized has no kernel for this format"]


def test_every_expert_gives_the_same_sum_as_the_chosen_ones():
    torch.manual_seed(0)
    experts = Experts([torch.nn.Linear(8, 8, bias=False) for _ in range(5)])
    x, ids, weights = torch.randn(7, 8), torch.stack([torch.randperm(5)[:2] for _ in range(7)]), torch.rand(7, 2)
    with torch.no_grad():
        few, all_of_them = experts._one_after_another(x, ids, weights), experts._all_of_them(x, ids, weights)
    torch.testing.assert_close(all_of_them, few)
