"""The pool's layout and its size."""

import logging

import pytest
import torch
from model.step_driver import make_runner
from model.tiny_models import make_model, save_model
from pydantic import ValidationError

from llmd.config import CacheConfig
from llmd.errors import ModelError
from llmd.model import kv_tensors
from llmd.model.kv_tensors import KVTensors, NoRoom, block_bytes, host_pool_bytes, kv_dtype, promised_bytes, size_pool
from llmd_kernels.quantized_kv import dequantize

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
    kv.layers[0].fill_(1)
    kv.refill()  # though it was not given back
    assert not kv.layers[0].any()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("[..] DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_a_refill_that_finds_no_memory_can_be_tried_again(monkeypatch, error):
    kv = KVTensors(5, 3, (2, 4, 2, 6), torch.float32, CPU)
    kv.release()
    with monkeypatch.context() as scarce:
        scarce.setattr(kv_tensors, "zeros", lambda *_: (_ for _ in ()).throw(error))
        scarce.setattr(kv_tensors, "free_memory", lambda: 3 << 20)
        with pytest.raises(NoRoom, match=r"cpu has no 5.62 KiB for the KV pool: 3.00 MiB are free") as raised:
            kv.refill()
        assert isinstance(raised.value, ModelError)
        assert kv.pool is None
        assert promised_bytes() == 0 or kv.layers == ()
        scarce.setattr(kv_tensors, "zeros", lambda *_: (_ for _ in ()).throw(ValueError("another")))
        with pytest.raises(ValueError, match="another"):
            kv.refill()
    kv.refill()
    assert len(kv.layers) == 3


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
    monkeypatch.setattr(kv_tensors, "promised_bytes", lambda: 0)
    monkeypatch.setattr(kv_tensors, "free_memory", lambda: 4 << 30)
    assert host_pool_bytes(CacheConfig()) == 1 << 30
    assert host_pool_bytes(CacheConfig(), 7 << 29) == 1 << 29  # weights and steps leave less
    assert host_pool_bytes(CacheConfig(), 5 << 30) == 0
    monkeypatch.setattr(kv_tensors, "free_memory", lambda: 400 << 30)
    assert host_pool_bytes(CacheConfig()) == 4 << 30
    assert host_pool_bytes(CacheConfig(kv_cache_bytes=12345)) == 12345


def test_what_other_pools_were_promised_is_not_free(monkeypatch):
    monkeypatch.setattr(kv_tensors, "free_memory", lambda: 4 << 30)
    before, room = promised_bytes(), host_pool_bytes(CacheConfig())
    kv = KVTensors(5, 3, (2, 4, 2, 6), torch.float32, CPU)
    assert promised_bytes() == before + kv.num_bytes
    assert host_pool_bytes(CacheConfig()) == room - kv.num_bytes // 4
    kv.release()
    assert promised_bytes() == before


def test_dtypes():
    assert kv_dtype("auto", torch.bfloat16) == torch.bfloat16
    assert kv_dtype("float32", torch.bfloat16) == torch.float32
    with pytest.raises(ModelError, match="kv_cache_dtype must be"):
        kv_dtype("fp8_e5m2", torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "kept"), [("fp8_e4m3", "fp8"), ("fp8_per_token_head", "fp8"), ("int8_per_token_head", "int8")]
)
def test_vllms_names_of_dtypes(name, kept):
    assert CacheConfig(kv_cache_dtype=name).kv_cache_dtype == kept


@pytest.mark.parametrize("name", ["fp8_e5m2", "int4", 8])
def test_other_dtypes_are_refused(name):
    with pytest.raises(ValidationError, match=r"kv_cache_dtype\n.*'int8' or 'fp8'"):
        CacheConfig(kv_cache_dtype=name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_block_is_one_piece_with_its_scales(dtype):
    kv = KVTensors(5, 3, (2, 4, 2, 6), dtype, CPU)
    assert kv.pool[1].is_contiguous()
    assert kv.num_bytes == kv.pool.numel() == 5 * block_bytes(3, (2, 4, 2, 6), dtype)
    assert kv.layers[1].shape == (5, 2, 4, 2, 6)
    assert kv.layers[1].data.dtype == dtype
    assert not dequantize(*kv.layers[1]).any()
    kv.layers[1].scales[4] = 2.0
    kv.layers[1].data.view(torch.uint8)[4] = 1
    copied = KVTensors(5, 3, (2, 4, 2, 6), dtype, CPU)
    copied.pool[0] = kv.pool[4]
    assert torch.equal(dequantize(*copied.layers[1])[0], dequantize(*kv.layers[1])[4])
    assert dequantize(*copied.layers[1])[0].all()


def test_eight_bits_hold_almost_twice_the_tokens():
    shape = (2, 16, 8, 128)
    ratio = block_bytes(32, shape, torch.bfloat16) / block_bytes(32, shape, torch.int8)
    assert ratio == pytest.approx(2 / (1 + 2 / 128))
    with pytest.raises(ModelError, match=r"common layout .* not \[16, 8\]"):
        block_bytes(32, (16, 8), torch.int8)


def test_the_pool_of_a_model_in_eight_bits(tmp_path):
    path = save_model(make_model("Llama"), tmp_path)
    plain, small = (make_runner(path, cache={"kv_cache_dtype": name, "block_size": 16}) for name in ("bfloat16", "int8"))
    assert small.info.num_blocks / plain.info.num_blocks == pytest.approx(1280 / 704, rel=0.01)
    assert small.kv.num_bytes <= 8 << 20


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_the_cache_may_have_a_dtype_of_its_own(tmp_path, name):
    runner = make_runner(save_model(make_model("Llama"), tmp_path), cache={"kv_cache_dtype": name})
    assert str(runner.kv.pool.dtype) == f"torch.{name}"


def test_errors_come_before_the_weights_are_read(tmp_path):
    path = save_model(make_model("Llama"), tmp_path)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="max_model_len 256 does not fit"):
        make_runner(path, max_model_len=256, cache={"kv_cache_bytes": 1 << 16})
