"""The pool's layout and its size."""

import logging

import pytest
import torch
from model.step_driver import make_runner
from model.tiny_models import make_model, save_model

from llmd.config import CacheConfig
from llmd.errors import ModelError
from llmd.model import kv_tensors
from llmd.model.kv_tensors import KVTensors, kv_dtype, pool_bytes, size_pool

CPU = torch.device("cpu")


def test_a_block_is_one_piece():
    kv = KVTensors(5, 3, (2, 4, 2, 6), torch.bfloat16, CPU)
    assert kv.pool[1].is_contiguous()
    assert len(kv.layers) == 3
    assert kv.layers[1].shape == (5, 2, 4, 2, 6)
    kv.layers[1][4, 1, 3] = 7
    assert kv.pool[4, 1, 1, 3].eq(7).all()
    assert kv.num_bytes == kv.pool.numel() * 2


def test_it_can_be_given_back_and_taken_again():
    kv = KVTensors(5, 3, (2, 4, 2, 6), torch.float32, CPU)
    kv.layers[0].fill_(1)
    kv.release()
    assert kv.pool is None
    assert kv.layers == ()
    kv.refill()
    assert not kv.layers[0].any()


def test_sizes():
    assert size_pool(1000, 100, 16, 64, None) == (10, 64)
    assert size_pool(1000, 100, 16, 64, 32) == (10, 32)


def test_the_models_context_shrinks_with_a_word(caplog):
    with caplog.at_level(logging.WARNING):
        assert size_pool(1000, 100, 16, 4096, None) == (10, 160)
    assert "max_model_len is 160, not the model's 4096" in caplog.text


def test_a_context_that_was_asked_for_must_fit():
    with pytest.raises(ModelError, match=r"max_model_len 161 .* 11 blocks of .* are .*, the pool has"):
        size_pool(1000, 100, 16, 4096, 161)
    with pytest.raises(ModelError, match="beyond the model's context of 4096"):
        size_pool(10**9, 100, 16, 4096, 4097)
    with pytest.raises(ModelError, match="does not fit the KV pool"):
        size_pool(99, 100, 16, 4096, None)


def test_a_cpus_default_is_a_quarter_of_what_is_free(monkeypatch):
    monkeypatch.setattr(kv_tensors, "free_memory", lambda: 4 << 30)
    assert pool_bytes(CacheConfig(), CPU) == 1 << 30
    monkeypatch.setattr(kv_tensors, "free_memory", lambda: 400 << 30)
    assert pool_bytes(CacheConfig(), CPU) == 4 << 30
    assert pool_bytes(CacheConfig(kv_cache_bytes=12345), CPU) == 12345


def test_dtypes():
    assert kv_dtype("auto", torch.bfloat16) == torch.bfloat16
    assert kv_dtype("float32", torch.bfloat16) == torch.float32
    with pytest.raises(ModelError, match="kv_cache_dtype must be"):
        kv_dtype("fp8", torch.bfloat16)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_the_cache_may_have_a_dtype_of_its_own(tmp_path, name):
    runner = make_runner(save_model(make_model("Llama"), tmp_path), cache={"kv_cache_dtype": name})
    assert str(runner.kv.pool.dtype) == f"torch.{name}"


def test_errors_come_before_the_weights_are_read(tmp_path):
    path = save_model(make_model("Llama"), tmp_path)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="max_model_len 256 does not fit"):
        make_runner(path, max_model_len=256, cache={"kv_cache_bytes": 1 << 16})
