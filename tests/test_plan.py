"""`llmd plan`: what is reckoned is what is then taken."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from llmd.cli import main_command
from llmd.config import Config
from llmd.daemon import build_service, load_catalog
from llmd.errors import ConfigError, ModelError
from llmd.model import footprint as footprint_module
from llmd.model.memory_room import HostMemory
from llmd.plan import parse_size, reckon_models

SETTINGS = {"models": [{"dtype": "float32", "device": "cpu"}], "cache": {"kv_cache_bytes": 16 << 20}}


def reckoned(**changes):
    """The only model's footprint."""
    device_bytes = changes.pop("device_bytes", None)
    config = Config.model_validate({**SETTINGS, **changes})
    return next(iter(reckon_models(config, load_catalog(config), device_bytes=device_bytes)))


@pytest.mark.parametrize(
    "model",
    [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"quantization": "int4"}],
    ids=["float32", "bfloat16", "int8", "int4"],
)
async def test_what_is_reckoned_is_taken(model):
    values = {**SETTINGS, "models": [{**SETTINGS["models"][0], **model}]}
    footprint = reckoned(**values)
    config = Config.model_validate(values)
    service = build_service(config, load_catalog(config), config.models[0])
    await service.start(lambda progress: None)
    info = service.engine.info
    await service.stop()
    assert (footprint.weights_bytes, footprint.num_blocks) == (info.weights_bytes, info.num_blocks)
    assert footprint.max_model_len == info.max_model_len
    assert footprint.dtype == info.facts["dtype"]


def test_a_model_larger_than_memory_is_told_with_the_arithmetic(monkeypatch):
    monkeypatch.setattr(footprint_module, "host_memory", lambda: HostMemory(80 << 20, "of 2.00 GiB"))
    monkeypatch.setattr(footprint_module, "promised_bytes", lambda: 0)
    with pytest.raises(ModelError, match=r"does not fit into memory: weights .* = .*, and 80.00 MiB are free \(of 2.00 GiB"):
        reckoned(cache={})


def test_a_gpu_that_is_not_here():
    footprint = reckoned(cache={}, models=[{}], device_bytes=parse_size("1GB"))
    used = footprint.weights_bytes + footprint.activation_bytes
    assert footprint.device == "cuda"
    assert footprint.pool_bytes == int(1e9 * 0.9) - used
    assert footprint.num_tokens * footprint.kv_bytes_per_token <= footprint.pool_bytes
    more = reckoned(cache={}, models=[{}], adapters={"enable_lora": True}, device_bytes=parse_size("1GB"))
    assert more.adapter_bytes > 0
    assert more.num_tokens < footprint.num_tokens
    with pytest.raises(ModelError, match="are less than the"):
        reckoned(cache={}, models=[{}], device_bytes=1000)


@pytest.mark.parametrize(
    ("text", "size"), [("141GB", 141 * 10**9), ("80 GiB", 80 << 30), ("1.5gb", 1_500_000_000), ("1000", 1000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "1 PB", "1e9"])
def test_no_sizes(text):
    with pytest.raises(ConfigError, match="--device-memory"):
        parse_size(text)


def test_the_command(tmp_path):
    path = tmp_path / "llmd.toml"
    path.write_text('[[models]]\nmodel = "demo"\ndevice = "cpu"\n[cache]\nkv_cache_bytes = 16000000\n')
    done = CliRunner().invoke(main_command, ["plan", "--config", str(path)], catch_exceptions=False)
    assert done.exit_code == 0
    for word in ("weights", "KV pool", "tokens", "sequences", "activations", "GB/s", "at a context", "likely", "estimated"):
        assert word in done.output
    done = CliRunner().invoke(main_command, ["plan", "--config", str(path), "--json", "--measure"], catch_exceptions=False)
    (row,) = json.loads(done.output)
    assert row["bandwidth"] > 0
    assert row["max_decode_rate"] == pytest.approx(row["bandwidth"] / row["step_bytes"])
    read = row["step_bytes"] + 1024 * row["kv_bytes_per_token"]
    assert row["decode_limit"] == pytest.approx(row["bandwidth"] / read)
    assert row["likely_decode_rate"] == pytest.approx(0.9 * row["decode_limit"])
    done = CliRunner().invoke(
        main_command, ["plan", "--config", str(path), "--json", "--no-measure"], catch_exceptions=False
    )
    assert json.loads(done.output)[0]["bandwidth"] is None
    path.write_text('[[models]]\nmodel = "demo"\ndevice = "cpu"\nmax_model_len = 512\n[cache]\nkv_cache_bytes = 100000\n')
    with pytest.raises(ModelError, match="max_model_len 512 does not fit"):
        CliRunner().invoke(main_command, ["plan", "--config", str(path)], catch_exceptions=False)
