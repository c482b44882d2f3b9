"""`llmd plan`: what is reckoned is what is then taken."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from llmd.api.v1 import ArchitectureSpec
from llmd.api.v1.testing.driver import installed_parts
from llmd.cli import main_command
from llmd.config import Config
from llmd.daemon import build_service, load_catalog
from llmd.errors import ConfigError, ModelError
from llmd.model import footprint as footprint_module
from llmd.model.footprint import reckon
from llmd.model.memory_room import HostMemory
from llmd.plan import check_fits, describe, parse_rate, parse_size, reckon_models, why_not

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
    assert footprint.device == "cuda"
    room = 10**9 - footprint.others_bytes - footprint.reserve_bytes - (footprint.taken_bytes - footprint.pool_bytes)
    assert room - footprint.block_bytes < footprint.pool_bytes <= room
    assert footprint.num_tokens * footprint.kv_bytes_per_token <= footprint.pool_bytes
    more = reckoned(cache={}, models=[{}], adapters={"enable_lora": True}, device_bytes=parse_size("1GB"))
    assert more.adapter_bytes > 0
    assert more.num_tokens < footprint.num_tokens
    assert reckoned(cache={}, models=[{}], device_bytes=1000).missing_bytes > 0


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    "rope_theta": 5e5, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "llama-70b": LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "qwen-7b": LLAMA | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 32768,
    },
    "mixtral": LLAMA | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 32768, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip


@pytest.fixture
def planned(tmp_path):
    """Footprints on a GPU of models that have a config.json alone."""

    def plan(*names, memory="141GB", bandwidth=None, model=None, **config):
        models = []
        for index, name in enumerate(names):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").write_text(json.dumps(SHAPES[name]))
            entry = {"model": str(tmp_path / name), "served_model_name": [f"m{index}"], "load_format": "dummy"}
            models.append(entry | (model or {}))
        settings = Config.model_validate({"models": models, **config})
        found = list(reckon_models(settings, load_catalog(settings), device_bytes=parse_size(memory), bandwidth=bandwidth))
        for footprint, entry in zip(found, settings.models, strict=True):
            assert footprint.missing_bytes == 0 or why_not(footprint, entry)
        return found if len(names) > 1 else (found[0], settings.models[0])

    return plan


def rows_of(footprint):
    return {row.name: row for row in footprint.rows()}


def test_seven_billion_on_a_card_of_24_gigabytes(planned):
    footprint, _ = planned("qwen-7b", memory="24GB", bandwidth=parse_rate("1TB/s"))
    assert footprint.weights_bytes == pytest.approx(7.6e9 * 2, rel=0.01)
    assert footprint.kv_bytes_per_token == 2 * 28 * 4 * 128 * 2
    assert footprint.taken_bytes <= footprint.limit_bytes == int(24e9 * 0.9)
    assert footprint.max_model_len == 32768
    assert footprint.num_sequences == footprint.num_tokens // 32768 > 0
    table = list(rows_of(footprint))
    words = ["device", "others", "share", "weights", "activations", "graphs", "outside torch", "reserve", "KV pool"]
    assert table == [*words, "tokens", "sequences"]
    assert footprint.decode_limit == pytest.approx(1e12 / (footprint.step_bytes + 1024 * footprint.kv_bytes_per_token))
    assert footprint.batch_decode_limit > 30 * footprint.decode_limit
    assert rows_of(footprint)["KV pool"].note.endswith("; what the share leaves")
    text = "\n".join(describe(footprint))
    assert "1,000.0 GB/s" in text
    assert "of all together at most" in text


def test_graphs_follow_the_ladder_and_the_wish_for_none(planned):
    many, _ = planned("qwen-7b", scheduler={"max_num_seqs": 256})
    few, _ = planned("qwen-7b", scheduler={"max_num_seqs": 8})
    none, _ = planned("qwen-7b", model={"enforce_eager": True})
    assert (few.graph_sizes, none.graph_sizes) == ((1, 2, 4, 8), ())
    assert many.graph_bytes > few.graph_bytes > none.graph_bytes == 0
    assert rows_of(few)["graphs"].note == "estimated: decode steps of 4 sizes, to 8 rows"


def test_seventy_billion_do_not_fit_and_what_would(planned):
    footprint, model = planned("llama-70b")
    assert footprint.weights_bytes == pytest.approx(70.6e9 * 2, rel=0.01)
    assert footprint.missing_bytes > 14e9
    with pytest.raises(ModelError, match=r"weights 131.42 GiB \+ .* do not fit: .* missing; what would fit:\n") as raised:
        check_fits(footprint, model)
    assert [line.partition(":")[0] for line in footprint.suggestions] == [
        'quantization = "int8"', 'quantization = "int4"', 'quantization = "int4", cache.kv_cache_dtype = "fp8"',
        "a device of 150.36 GiB",
    ]  # fmt: skip
    assert all(line in str(raised.value) for line in footprint.suggestions)
    larger, model = planned("llama-70b", memory="150.4GiB")
    check_fits(larger, model)
    assert larger.num_sequences >= 1


def test_seventy_billion_in_four_bits(planned):
    plain_kv, model = planned("llama-70b", model={"quantization": "int4"})
    check_fits(plain_kv, model)
    assert 36e9 < plain_kv.weights_bytes < 42e9
    eight_bits, _ = planned("llama-70b", model={"quantization": "int4"}, cache={"kv_cache_dtype": "fp8"})
    assert eight_bits.num_tokens / plain_kv.num_tokens == pytest.approx(2 / (1 + 2 / 128), rel=0.01)
    adapted, _ = planned("llama-70b", model={"quantization": "int4"}, adapters={"enable_lora": True, "max_loras": 8})
    more, _ = planned("llama-70b", model={"quantization": "int4"}, adapters={"enable_lora": True, "max_loras": 16})
    assert more.adapter_bytes == 2 * adapted.adapter_bytes > 0
    assert plain_kv.num_tokens > adapted.num_tokens > more.num_tokens
    assert "adapters" in rows_of(more)


def test_a_context_that_does_not_fit_and_the_one_that_does(planned):
    footprint, model = planned("qwen-7b", memory="20GB", model={"max_model_len": 32768})
    assert footprint.missing_bytes == 0
    assert f"max_model_len 32768 does not fit: the KV pool holds {footprint.num_tokens} tokens" in why_not(footprint, model)
    assert footprint.suggestions[0] == f"max_model_len = {footprint.num_tokens}"
    assert any(line.startswith('cache.kv_cache_dtype = "fp8": ') for line in footprint.suggestions)
    shorter, model = planned("qwen-7b", memory="20GB", model={"max_model_len": footprint.num_tokens})
    check_fits(shorter, model)


def test_an_exact_pool(planned):
    footprint, _ = planned("qwen-7b", cache={"kv_cache_bytes": 8 << 30})
    assert footprint.limit_bytes is None
    assert footprint.num_blocks == (8 << 30) // footprint.block_bytes
    assert rows_of(footprint)["KV pool"].note.endswith("cache.kv_cache_bytes")
    too_large, model = planned("qwen-7b", memory="24GB", cache={"kv_cache_bytes": 8 << 30})
    assert "missing" in why_not(too_large, model)
    assert any(line.startswith("no cache.kv_cache_bytes") for line in too_large.suggestions)


def test_a_mixture_reads_what_it_chooses(planned):
    footprint, _ = planned("mixtral", bandwidth=4.3e12)
    assert footprint.weights_bytes == pytest.approx(46.7e9 * 2, rel=0.01)
    assert footprint.token_bytes == pytest.approx(12.8e9 * 2, rel=0.01)  # without the embedding's table
    assert footprint.step_bytes > 3 * footprint.token_bytes
    assert footprint.max_decode_rate == pytest.approx(4.3e12 / footprint.token_bytes)


def test_models_on_one_gpu_are_neighbours(planned):
    first, second = planned("qwen-7b", "qwen-7b", memory="80GB")  # of which each has a half, where nobody says otherwise
    assert first.missing_bytes == second.missing_bytes == 0
    assert first.limit_bytes == int(80e9 * 0.45)
    first, second = planned("qwen-7b", "qwen-7b", memory="80GB", cache={"gpu_memory_utilization": 0.9})
    assert second.others_bytes == first.others_bytes + first.taken_bytes
    assert second.missing_bytes > 0
    assert second.suggestions[0].startswith("cache.gpu_memory_utilization = 0.45, of each of 2 models: ")
    first, second = planned("qwen-7b", "qwen-7b", memory="80GB", cache={"gpu_memory_utilization": 0.45})
    assert first.missing_bytes == second.missing_bytes == 0
    elsewhere = planned("qwen-7b", "qwen-7b", memory="80GB", model={"device": "cuda:1"})
    assert elsewhere[1].others_bytes > elsewhere[0].others_bytes


def test_states_are_told_beside_the_pool(tmp_path):
    """Of a hybrid: a layer in two keeps a state for each row, the others blocks."""
    spec = ArchitectureSpec(
        name="hybrid", summary="for tests", architectures=("HybridForCausalLM",), build=Hybrid, has_state=True
    )
    config = SHAPES["qwen-7b"] | {"architectures": ["HybridForCausalLM"], "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = Config.model_validate({"models": [{"model": str(tmp_path)}], "scheduler": {"max_num_seqs": 64}})
    footprint = reckon(settings, settings.models[0], tmp_path, installed_parts(spec), device_bytes=8 << 30)
    assert footprint.state_bytes == 64 * 2 * 1024 * 4
    assert footprint.kv_bytes_per_token == 2 * 2 * 4 * 128 * 2
    assert rows_of(footprint)["states"] == ("states", footprint.state_bytes, True, "8.00 KiB for each row")
    assert footprint.missing_bytes == 0


class Hybrid(nn.Module):
    """Two layers with a state, two that attend."""

    def __init__(self, config, layers):
        super().__init__()
        self.sums = [layers.state((1024,), torch.float32) for _ in range(2)]
        self.attention = [layers.attention(index) for index in range(2)]


@pytest.mark.parametrize(
    ("text", "size"), [("141GB", 141 * 10**9), ("80 GiB", 80 << 30), ("1.5gb", 1_500_000_000), ("1000", 1000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "1 PB", "1e9"])
def test_no_sizes(text):
    with pytest.raises(ConfigError, match="--device-memory"):
        parse_size(text)


@pytest.mark.parametrize(("text", "rate"), [("4.3TB/s", 4_300_000_000_000), ("900 GB/s", 900 * 10**9), ("1TB", 10**12)])
def test_rates(text, rate):
    assert parse_rate(text) == rate
    with pytest.raises(ConfigError, match="--device-bandwidth"):
        parse_rate("fast")


def test_the_command_for_a_gpu(tmp_path):
    path = tmp_path / "llmd.toml"
    path.write_text('[[models]]\nmodel = "demo"\n')
    asked = ["plan", "--config", str(path), "--device-memory", "80GB", "--device-bandwidth", "3.35TB/s"]
    done = CliRunner().invoke(main_command, asked, catch_exceptions=False)
    assert done.exit_code == 0
    for word in ("share", "graphs", "outside torch", "KV pool", "3,350.0 GB/s", "such at once"):
        assert word in done.output
    (row,) = json.loads(CliRunner().invoke(main_command, [*asked, "--json"], catch_exceptions=False).output)
    assert (row["missing_bytes"], row["suggestions"]) == (0, [])
    assert row["pool_bytes"] == row["num_blocks"] * row["block_bytes"]
    with pytest.raises(ModelError, match="a device of"):
        CliRunner().invoke(main_command, [*asked[:4], "200MB"], catch_exceptions=False)


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
