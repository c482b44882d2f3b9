"""Steps on a device: graphs and eager steps draw the same tokens, nothing waits, and memory that runs short ends nothing."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.gpu import small
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import write_model
from llmd import LLM, SamplingParams

MODEL = "qwen2.5-0.5b"
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, detokenize=False)

NEIGHBOUR = """
import sys, torch
held = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def setting(device, tmp_path):
    return Setting(device, True, MODEL, tmp_path, {})


def test_graphs_draw_the_tokens_of_eager_steps(setting):
    replays = []
    if setting.device.type == "cuda":
        replay = torch.cuda.CUDAGraph.replay
        with mock.patch.object(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))):
            found = small.graphs(setting)
        assert len(replays) > 4
    else:
        found = small.graphs(setting)
    assert found == {"tokens": 40, "same": 1.0}


def test_steps_in_flight_wait_for_nothing(setting):
    assert small.no_waits(setting) == {"waits": 0}


def test_a_model_answers(setting):
    assert small.generate(setting) == {"output_tokens": 27}


def write_wide(folder):
    """A model whose activations are much larger than its weights: 16 KB a token in each half of its MLP."""
    config = write_model(folder, MODEL, is_tiny=True)
    config |= {"hidden_size": 448, "intermediate_size": 4096, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_step_without_memory_is_computed_again_in_smaller_ones(device, tmp_path):
    write_wide(tmp_path)
    options = {"max_model_len": 8192, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 8192}
    with LLM(str(tmp_path), dtype="float32", device=device.type, load_format="dummy", **options) as llm:
        length = 8000 if device.type == "cuda" else 200
        prompt = {"prompt_token_ids": [index * 7 % 990 for index in range(length)]}
        first = llm.generate([prompt], GREEDY, use_tqdm=False)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            room = torch.cuda.memory_reserved() + (96 << 20)  # an MLP of 8,000 tokens wants 260 MB and more
            torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
        try:
            llm._loop.call(_forget(llm))
            again = llm.generate([prompt], GREEDY, use_tqdm=False)
        finally:
            if device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0)
        failures = llm._service.engine.stats().num_out_of_memory
    assert [len(output.outputs[0].token_ids) for output in (*first, *again)] == [6, 6]
    assert (failures > 0) == (device.type == "cuda")


async def _forget(llm):
    llm._service.engine.reset_prefix_cache()


def test_the_pool_leaves_a_neighbour_what_it_holds(device, tmp_path):
    held = 2 << 30
    write_model(tmp_path, MODEL, is_tiny=True)
    options = {"max_model_len": 128, "max_num_seqs": 8, "gpu_memory_utilization": 0.5}
    if device.type == "cpu":
        options = {"max_model_len": 128, "max_num_seqs": 8, "kv_cache_memory_bytes": 16 << 20}
    with Neighbour(held if device.type == "cuda" else 0):
        free, total = torch.cuda.mem_get_info() if device.type == "cuda" else (1, 1)
        with LLM(str(tmp_path), dtype="bfloat16", device=device.type, load_format="dummy", **options) as llm:
            [output] = llm.generate([{"prompt_token_ids": [1, 2, 3]}], GREEDY, use_tqdm=False)
            pool = llm._service.engine.info.kv_bytes
    assert len(output.outputs[0].token_ids) == 6
    assert pool > 0
    if device.type == "cuda":
        assert pool < min(free, 0.5 * total)


class Neighbour:
    """A process that holds so many bytes of the GPU; none for 0."""

    def __init__(self, num_bytes):
        self._num_bytes, self._process = num_bytes, None

    def __enter__(self):
        if self._num_bytes:
            command = [sys.executable, "-c", NEIGHBOUR, str(self._num_bytes)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self._process.stdout.readline() == "held\n"

    def __exit__(self, *failure):
        if self._process is not None:
            self._process.communicate("")


def test_the_neighbour_is_a_program():
    compile(NEIGHBOUR, "neighbour", "exec")
    assert Path(sys.executable).exists()
    with Neighbour(0):
        pass
