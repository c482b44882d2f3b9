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
    machine[1]._graphs.clear()
    return machine[1]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(make_model("Qwen3"), tmp_path_factory.mktemp("model"))


def admitted(row, params, num_tokens=6):
    ids = tuple(range(num_tokens))
    return RowAdmit(row=row, seq_id=row, request_id="", token_ids=ids, num_prompt_tokens=num_tokens, params=params, seed=row)


def columns(rows, starts, counts):
    return {"rows": rows, "starts": starts, "counts": counts, "num_logits": [1] * len(rows), "samples": [True] * len(rows)}


@pytest.mark.parametrize("params", WISHES.values(), ids=WISHES)
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


def test_decode_steps_are_captured_once_and_replayed(device, runner):
    blocks = [BlockUpdate(row, 0, 0, range(3 * row, 3 * row + 3)) for row in range(4)]
    greedy = SamplingParams(temperature=0.0, max_tokens=9)
    admits = [admitted(row, greedy) for row in range(4)]
    runner.launch(
        StepPlan(step_id=1, admitted=admits, block_updates=blocks, **columns([0, 1, 2, 3], [5] * 4, [1] * 4))
    ).result()
    assert device.launches.count("decode") == 2 * runner._model.config.num_layers  # run, then captured
    device.clear()
    for rows in ([0, 1, 2, 3], [3, 0, 2]):  # three rows in the graph of four
        pending = runner.launch(StepPlan(step_id=2, **columns(rows, [6] * len(rows), [1] * len(rows))))
        assert (device.waits, device.launches) == ([], ["replay", "maxima_of", "pick"])
        assert len(pending.result().token_ids) == len(rows)
        device.clear()
    assert list(runner._graphs._graphs) == [(4, 0)]


def test_grammar_masks_do_not_wait_either(device, runner):
    masks: Future = Future()
    masks.set_result(np.full((1, -(-runner._model.config.vocab_size // 32)), -1, np.int32))
    plan = StepPlan(
        step_id=1, admitted=[admitted(0, SamplingParams(max_tokens=9))], block_updates=[BlockUpdate(0, 0, 0, range(3))],
        masked=[0], **columns([0], [0], [6]),
    )  # fmt: skip
    runner.launch(plan, masks)
    assert device.waits == []


def test_the_device_sees_every_way_of_waiting(device):
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
        "set by a mask": lambda: x.__setitem__(x > 1, 0.0),
        "repeat": lambda: torch.ones(3, dtype=torch.int64, device="cuda").repeat_interleave(x.long()),
    }
    for name, wait in waits.items():
        device.clear()
        with contextlib.suppress(RuntimeError):  # what a size hangs on cannot go on
            wait()
        assert device.waits, name
    device.clear()
    torch.zeros(3, pin_memory=True).copy_(x, non_blocking=True)
    x.copy_(torch.ones(3))
    assert (device.waits, len(device.copies_to_host)) == ([], 1)
