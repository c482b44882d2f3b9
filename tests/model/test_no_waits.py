"""A step on a GPU, up to its PendingStep, never waits for the device: seen on one that computes nothing."""

import contextlib
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from model.fake_cuda import fake_cuda
from model.tiny_models import make_model, save_model

from llmd.api.v1.testing.driver import installed_parts
from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.params import SamplingParams
from llmd.engine.step import BlockUpdate, RowAdmit, StepPlan, TokenUpdate
from llmd.model.runner import Runner

pytest.importorskip("triton")

WISHES = {
    "greedy": {"temperature": 0.0},
    "drawn": {},
    "cut": {"top_k": 5, "top_p": 0.9, "min_p": 0.01},
    "changed": {"presence_penalty": 0.5, "logit_bias": {3: 1.0}, "min_tokens": 3, "allowed_token_ids": [1, 2, 3]},
    "logprobs": {"logprobs": 3, "repetition_penalty": 1.2},
}


@pytest.fixture(scope="module")
def machine(path):
    with fake_cuda(compiles=True) as device:
        made = Runner(
            ModelConfig(model=str(path), dtype="float32", device="cuda"),
            CacheConfig(block_size=4, kv_cache_bytes=8 << 20),
            SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
            path,
            installed_parts(),
        )
        made.load(lambda progress: None)
        yield device, made


@pytest.fixture
def device(machine):
    machine[0].clear()
    return machine[0]


@pytest.fixture
def runner(machine):
    return machine[1]


@pytest.fixture
def without_graphs(runner, monkeypatch):
    monkeypatch.setattr(runner._graphs, "choose", lambda plan, variant: None)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(make_model("Qwen3"), tmp_path_factory.mktemp("model"))


def admitted(row, params, num_tokens=6):
    ids = tuple(range(num_tokens))
    return RowAdmit(row=row, seq_id=row, request_id="", token_ids=ids, num_prompt_tokens=num_tokens, params=params, seed=row)


def columns(rows, starts, counts):
    return {"rows": rows, "starts": starts, "counts": counts, "num_logits": [1] * len(rows), "samples": [True] * len(rows)}


@pytest.mark.parametrize("params", WISHES.values(), ids=WISHES)
@pytest.mark.usefixtures("without_graphs")
def test_launching_waits_for_nothing_and_the_result_for_one_event(device, runner, params):
    params = SamplingParams(max_tokens=9, **params)
    blocks = [BlockUpdate(row, 0, 0, range(3 * row, 3 * row + 3)) for row in range(3)]
    first = StepPlan(
        step_id=1, admitted=[admitted(row, params) for row in range(3)], block_updates=blocks,
        **columns([0, 1, 2], [0, 2, 5], [6, 4, 1]),
    )  # fmt: skip
    decode = StepPlan(step_id=2, token_updates=[TokenUpdate(1, 6, [4])], **columns([0, 1, 2], [6, 6, 6], [1, 1, 1]))
    pending = [runner.launch(first), runner.launch(decode)]  # two in flight
    assert device.waits == []
    assert len(device.copies_to_host) == 2
    assert {"look_up", "rotate_and_store", "prefill", "decode", "pick"} <= set(device.launches)
    for step in pending:
        assert len(step.result().token_ids) == 3
    assert device.waits == ["event", "event"]


@pytest.mark.usefixtures("without_graphs")
def test_kernels_are_launched_for_what_rows_want_only(device, runner):
    blocks = [BlockUpdate(row, 0, 0, range(3 * row, 3 * row + 3)) for row in range(2)]
    greedy = SamplingParams(temperature=0.0, max_tokens=9)
    admits = [admitted(0, greedy), admitted(1, greedy)]
    runner.launch(StepPlan(step_id=1, admitted=admits, block_updates=blocks, **columns([0, 1], [5, 5], [1, 1])))
    assert not {"narrow", "tally", "count", "parts"} & set(device.launches)
    device.clear()
    admits = [admitted(1, SamplingParams(top_p=0.5, presence_penalty=1.0, logprobs=1, max_tokens=9))]
    runner.launch(StepPlan(step_id=2, released=[1], admitted=admits, **columns([0, 1], [6, 5], [1, 1])))
    names = [name for name in device.launches if name in ("narrow", "tally", "count", "apply", "parts", "pick")]
    assert names == ["count", "apply", "tally", *["narrow"] * 8, "tally", "pick", "parts"]


def begun(runner, params, num_rows=4):
    """Rows that have five tokens and want the sixth."""
    blocks = [BlockUpdate(row, 0, 0, range(3 * row, 3 * row + 2)) for row in range(num_rows)]
    admits = [admitted(row, params, 5) for row in range(num_rows)]
    columns_of = columns(list(range(num_rows)), [0] * num_rows, [5] * num_rows)
    runner.launch(StepPlan(step_id=1, admitted=admits, block_updates=blocks, **columns_of)).result()


@pytest.mark.parametrize("name", ["greedy", "drawn", "cut"])
def test_a_decode_step_is_a_copy_two_replays_and_a_copy(device, runner, name):
    begun(runner, SamplingParams(max_tokens=9, **WISHES[name]))
    for position, rows in enumerate(([0, 1, 2, 3], [0, 1, 2, 3], [3, 0, 2]), 5):  # three rows in the graph of four
        device.clear()
        block = [BlockUpdate(3, 0, position // 4, [40 + position])] if position % 4 == 0 else []
        plan = StepPlan(step_id=2, block_updates=block, **columns(rows, [position] * len(rows), [1] * len(rows)))
        pending = runner.launch(plan)
        assert device.waits == []
        assert len(pending.result().token_ids) == len(rows)
        assert device.waits == ["event"]
        if position > 5:  # the way of sampling is captured with the first step that has it
            assert device.launches == ["replay", "replay"]
            assert (len(device.copies_there), len(device.copies_to_host)) == (1, 1)
            assert not device.captures


def test_the_sizes_that_serve_every_step_are_captured_before_any(machine):
    graphs = machine[1]._graphs
    assert {key for key in graphs._graphs if not key.variant} == {(8, 0), (4, 0), (2, 0), (1, 0)}
    assert not machine[1].lacks_graphs


@pytest.mark.parametrize("name", ["changed", "logprobs"])
def test_what_cannot_be_captured_is_sampled_after_the_replay(device, runner, name):
    begun(runner, SamplingParams(max_tokens=9, **WISHES[name]))
    device.clear()
    pending = runner.launch(StepPlan(step_id=2, **columns([1, 0, 2], [5] * 3, [1] * 3)))
    assert device.waits == []
    assert device.launches[0] == "replay"
    assert "pick" in device.launches
    assert "decode" not in device.launches
    assert len(pending.result().token_ids) == 3


def test_prompt_logprobs_arrive_with_the_result(device, runner):
    params = SamplingParams(temperature=0.0, prompt_logprobs=2, max_tokens=9)
    plan = StepPlan(
        step_id=1, admitted=[admitted(0, params)], block_updates=[BlockUpdate(0, 0, 0, range(3))],
        **{**columns([0], [0], [6]), "num_logits": [6]},
    )  # fmt: skip
    pending = runner.launch(plan)
    assert device.waits == []
    assert len(pending.result().prompt_logprobs[0]) == 5


def test_a_step_without_tokens_ends_with_an_event_too(device, runner):
    admit = admitted(0, SamplingParams(max_tokens=9))
    pending = runner.launch(
        StepPlan(
            step_id=1, admitted=[admit], block_updates=[BlockUpdate(0, 0, 0, range(3))], rows=[0], starts=[0], counts=[3],
            num_logits=[0], samples=[False],
        )
    )  # fmt: skip
    assert device.waits == []
    assert pending.result().token_ids == ()
    assert device.waits == ["event"]


def test_grammar_masks_do_not_wait_either(device, runner):
    masks: Future = Future()
    masks.set_result(np.full((1, -(-runner.model.config.vocab_size // 32)), -1, np.int32))
    plan = StepPlan(
        step_id=1, admitted=[admitted(0, SamplingParams(max_tokens=9))], block_updates=[BlockUpdate(0, 0, 0, range(3))],
        masked=[0], **columns([0], [0], [6]),
    )  # fmt: skip
    runner.launch(plan, masks)
    assert device.waits == []


@pytest.mark.parametrize("is_step", [True, False])  # steps run in inference mode, where torch asks for other operators
def test_the_device_sees_every_way_of_waiting(device, is_step):
    with torch.inference_mode(is_step):
        check_ways_of_waiting(device)


def check_ways_of_waiting(device):
    x = torch.zeros(3, device="cuda")
    waits = {
        "item": lambda: x[0].item(),
        "bool": lambda: bool(x.sum() > 1),
        "cpu": lambda: x.cpu(),
        "tolist": lambda: x.tolist(),
        "copy_": lambda: torch.zeros(3).copy_(x),
        "synchronize": torch.cuda.synchronize,
        "nonzero": lambda: x.nonzero(),
        "mask": lambda: x[x > 1],
        "ordinary memory": lambda: x.copy_(torch.ones(3), non_blocking=True),
        "pinned memory, waited for": lambda: x.copy_(torch.ones(3, pin_memory=True)),
        "set by a mask": lambda: x.__setitem__(x > 1, 0.0),
        "repeat": lambda: torch.ones(3, dtype=torch.int64, device="cuda").repeat_interleave(x.long()),
    }
    if torch.is_inference_mode_enabled():
        waits["ordinary memory, another way"] = lambda: torch.ones(3).to("cuda", non_blocking=True)
    for name, wait in waits.items():
        device.clear()
        with contextlib.suppress(RuntimeError):  # what a size hangs on cannot go on
            wait()
        assert device.waits, name
    device.clear()
    torch.zeros(3, pin_memory=True).copy_(x, non_blocking=True)
    x.copy_(torch.ones(3, pin_memory=True), non_blocking=True)
    assert (device.waits, len(device.copies_to_host)) == ([], 1)
