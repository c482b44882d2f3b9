"""A model that does not fit into memory is refused before it is loaded, with the sum and what to change."""

import json
import os
import sys

import pytest
import torch
from model.fake_gpu_memory import fake_gpu_memory
from model.machines import add_cgroup2, add_memory, write
from model.step_driver import make_runner

from llmd.api.v1.testing.driver import installed_parts
from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.errors import ModelError
from llmd.model import footprint, kv_tensors
from llmd.model.loader import plan_model
from llmd.model.memory_room import RESERVE_BYTES, HostMemory, check_room, free_memory, host_memory, show

MIB, GIB = 1 << 20, 1 << 30
HALF_B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Says how much memory there is, to all that ask."""

    def set_free(num_bytes):
        monkeypatch.setattr(footprint, "host_memory", lambda: HostMemory(num_bytes, "of 1.00 TiB"))
        monkeypatch.setattr(kv_tensors, "free_memory", lambda: num_bytes)
        monkeypatch.setattr(kv_tensors, "promised_bytes", lambda: 0)
        monkeypatch.setattr(footprint, "promised_bytes", lambda: 0)

    return set_free


@pytest.fixture
def half_b(tmp_path):
    """A model of 0.5B parameters without weights."""
    (tmp_path / "config.json").write_text(json.dumps(HALF_B))
    return tmp_path


@pytest.fixture
def tiny(tmp_path):
    """One that takes a megabyte."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 500,
    }
    (tmp_path / "config.json").write_text(json.dumps(HALF_B | sizes))
    return tmp_path


def test_the_machine_or_the_tightest_group(tmp_path):
    add_memory(tmp_path, 4 * GIB, 8 * GIB)
    assert host_memory(tmp_path) == HostMemory(4 * GIB, "of 8.00 GiB", 8 * GIB)
    top = add_cgroup2(tmp_path, "/llmd.service")
    write(top, "llmd.service/memory.max", str(512 * MIB))
    write(top, "llmd.service/memory.current", str(212 * MIB))
    found = host_memory(tmp_path)
    assert found.free_bytes == 300 * MIB
    assert found.why == "memory.max of /llmd.service is 512.00 MiB, of which 212.00 MiB are used"


def test_without_proc_there_is_still_an_answer(tmp_path):
    assert free_memory(tmp_path) > 0


def test_the_sum_and_what_to_change():
    needs = {"weights": 900 * MIB, "adapter slots": 0, "KV pool": 50 * MIB, "working memory": 300 * MIB}
    check_room("model", needs, HostMemory(1250 * MIB + RESERVE_BYTES, ""))
    with pytest.raises(ModelError) as caught:
        check_room("model", needs, HostMemory(1200 * MIB, "of 2.00 GiB"), promised_bytes=200 * MIB)
    assert str(caught.value) == (
        "model does not fit into memory: weights 900.00 MiB + KV pool 50.00 MiB + working memory 300.00 MiB + reserve 64.00 "
        "MiB = 1.28 GiB, and 1000.00 MiB are free (of 2.00 GiB, 200.00 MiB of it promised to other models; swap does not "
        "count): 314.00 MiB are missing. Give it more memory, or take fewer bits (quantization = 'int8' or 'int4') or a "
        "smaller model"
    )
    with pytest.raises(ModelError, match=r"or lower cache\.kv_cache_bytes$"):
        check_room("model", {"weights": MIB, "KV pool": 9 * GIB}, HostMemory(GIB, ""))


def test_a_model_larger_than_its_group_is_refused_before_it_is_loaded(half_b, machine):
    before = resident_bytes()
    machine(350 * MIB)  # what a process with torch has left of 512 MiB
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM does not fit into memory: weights 942.* are missing"):
        make_runner(half_b, load_format="dummy", dtype="bfloat16")
    assert resident_bytes() - before < 100 * MIB


def test_a_small_model_runs_in_a_small_group(tiny, machine):
    machine(120 * MIB)
    runner = make_runner(tiny, load_format="dummy", cache={"kv_cache_bytes": None})
    assert runner.info.kv_bytes <= 30 * MIB
    runner.close()


def test_the_pool_takes_what_is_left(tiny, machine):
    machine(RESERVE_BYTES + 3 * MIB)
    runner = make_runner(tiny, load_format="dummy", cache={"kv_cache_bytes": None})
    assert 0 < runner.info.kv_bytes < 3 * MIB
    runner.close()


def test_a_pool_that_was_asked_for_must_fit(tiny, machine):
    machine(GIB)
    with pytest.raises(ModelError, match=r"KV pool 2.00 GiB .* or lower cache.kv_cache_bytes"):
        make_runner(tiny, load_format="dummy", cache={"kv_cache_bytes": 2 * GIB})


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_quantized_weights_are_counted_as_they_are_kept(half_b, machine, quantization, monkeypatch):
    """942 MiB in sixteen bits, 475 MiB in eight: as one of the two it fits, and is then loaded."""
    machine(1100 * MIB)

    class Loading(Exception):
        pass

    def load(*arguments, **options):
        raise Loading

    monkeypatch.setattr("llmd.model.runner.load_model", load)
    expected = Loading if quantization else ModelError
    with pytest.raises(expected):
        make_runner(half_b, load_format="dummy", dtype="bfloat16", quantization=quantization)


def test_where_the_files_fit_by_far_nothing_is_built_to_reckon(tiny, machine, monkeypatch):
    machine(64 * GIB)
    monkeypatch.setattr(footprint, "build_empty", None)
    monkeypatch.setattr(footprint, "_file_bytes", lambda model, path: GIB)
    make_runner(tiny, load_format="dummy").close()


def test_files_are_counted(tiny):
    for name in ("a.safetensors", "b.safetensors", "tokenizer.json"):
        write(tiny, name, "x" * 99)
    assert footprint._file_bytes(ModelConfig(), tiny) == 200
    assert footprint._file_bytes(ModelConfig(), tiny / "a.safetensors") == 100
    assert footprint._file_bytes(ModelConfig(load_format="dummy"), tiny) == 0


def test_bytes_for_people():
    assert [show(size) for size in (512, 3 * MIB, 5 * GIB // 2)] == ["0.50 KiB", "3.00 MiB", "2.50 GiB"]


def resident_bytes():
    if not sys.platform.startswith("linux"):
        pytest.skip("no /proc")
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reserve_on_gpu(path, **model):
    """What a start does before it reads the weights."""
    parts, cache, scheduler = installed_parts(), CacheConfig(), SchedulerConfig()
    config = ModelConfig(model=str(path), **model)
    planned = plan_model(config, path, parts, block_size=16, kv_cache_dtype="auto", device=torch.device("cuda"))
    return footprint.reserve_memory(config, cache, scheduler, path, parts, planned)


def test_a_gpu_without_room_is_told_before_weights_are_read(half_b):
    with fake_gpu_memory(8 * GIB, others=7 * GIB):
        message = r"does not fit into cuda: weights 942.29 MiB .* 1.00 GiB are free \(of 8.00 GiB, others have 7.00 GiB\)"
        with pytest.raises(ModelError, match=message):
            reserve_on_gpu(half_b)
        with fake_gpu_memory(8 * GIB):
            assert reserve_on_gpu(half_b) > 900 * MIB


def test_on_a_gpu_the_files_say_enough_where_they_fit_easily(half_b, monkeypatch):
    (half_b / "model.safetensors").write_bytes(b"")
    os.truncate(half_b / "model.safetensors", GIB)
    monkeypatch.setattr(footprint, "build_empty", None)  # nobody asks for it
    with fake_gpu_memory(8 * GIB, others=GIB):
        assert GIB < reserve_on_gpu(half_b) < 2 * GIB
