"""Loading checkpoints: sharded, cast, tied, headless; and every way in which one can be broken, each named."""

import json
import subprocess
import sys

import pytest
import torch
from model.step_driver import StepDriver, make_runner, model_parts
from model.tiny_models import make_model, prompts, reference_generate, save_model
from safetensors.torch import load_file, save_file

from llmd.errors import ModelError

KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def model():
    return make_model("Llama", tie_word_embeddings=True)


@pytest.fixture
def path(model, tmp_path):
    return save_model(model, tmp_path)


def rewrite(path, change):
    """Change the checkpoint's tensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def check_generates(model, path, **kwargs):
    driver = StepDriver(make_runner(path, **kwargs))
    sequence = driver.sequence(prompts(12)[0])
    driver.generate([sequence], 5)
    assert sequence.tokens == reference_generate(model, sequence.tokens[:12], 5)


def test_shards_are_read_through_the_index(model, tmp_path):
    save_model(model, tmp_path, max_shard_size="100KB")
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    check_generates(model, tmp_path)


def test_progress_names_the_shard_and_ends_at_one(model, tmp_path):
    from llmd.config import ModelConfig
    from llmd.model.loader import load_model, plan_model

    save_model(model, tmp_path, max_shard_size="100KB")
    config, parts, reports = ModelConfig(model="tiny", device="cpu"), model_parts(), []
    blueprint = plan_model(config, tmp_path, parts, block_size=16, kv_cache_dtype="auto")
    loaded = load_model(config, tmp_path, parts, blueprint, max_model_len=64, report=reports.append)
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)
    assert reports[0].phase.startswith("shard 1/")
    assert loaded.weights_bytes == sum(p.numel() * p.element_size() for p in loaded.module.parameters())
    assert not any(p.is_meta for p in loaded.module.parameters())


def test_weights_are_cast_on_the_way(model, path):
    runner = make_runner(path, dtype="bfloat16")
    assert {p.dtype for p in runner.model.module.parameters()} == {torch.bfloat16}
    assert runner.info.facts["dtype"] == "bfloat16"


def test_float16_becomes_bfloat16_on_a_cpu(model, tmp_path):
    save_model(make_model("Llama").half(), tmp_path)
    assert make_runner(tmp_path, dtype="auto").info.facts["dtype"] == "bfloat16"


def test_names_without_the_base_models_prefix(model, path):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(path, strip)
    check_generates(model, path)


def test_a_tied_head_in_the_file_and_inverse_frequencies_are_left_alone(model, path):
    def add(tensors):
        tensors["lm_head.weight"] = torch.zeros(97, 60)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(10)

    rewrite(path, add)
    check_generates(model, path)


def test_missing_tensor(path):
    rewrite(path, lambda tensors: tensors.pop(KEY))
    with pytest.raises(ModelError, match=f"lacks tensor {KEY}"):
        make_runner(path)


def test_extra_tensor(path):
    rewrite(path, lambda tensors: tensors.update({"model.layers.9.mlp.experts.weight": torch.zeros(3)}))
    with pytest.raises(ModelError, match=r"holds tensor model\.layers\.9\.mlp\.experts\.weight"):
        make_runner(path)


def test_wrong_shape(path):
    rewrite(path, lambda tensors: tensors.update({KEY: torch.zeros(40, 61)}))
    with pytest.raises(
        ModelError, match=rf"{KEY} in model.safetensors has shape \[40, 61\], config.json asks for \[40, 60\]"
    ):
        make_runner(path)


def test_truncated_file(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model.safetensors is truncated: .* tensor .* is cut off"):
        make_runner(path)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, (10).to_bytes(8, "little") + b"{{{{{{{{{{", (2).to_bytes(8, "little") + b"[]"]
)
def test_garbled_file(path, content):
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        make_runner(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        [],
    ],
)
def test_garbled_entry(path, entry):
    header = json.dumps({"some.weight": entry}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ModelError, match=r"some\.weight"):
        make_runner(path)


def test_missing_shard(model, tmp_path):
    save_model(model, tmp_path, max_shard_size="100KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"{gone.name} is missing"):
        make_runner(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", 3])
def test_index_that_leaves_the_folder(path, name):
    (path / "model.safetensors").rename(path / "other.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ModelError, match="outside the model's folder"):
        make_runner(path)


def test_no_weights_at_all(path):
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights found"):
        make_runner(path)


def test_unknown_load_format(path):
    with pytest.raises(ModelError, match="load_format 'pickle' is not known; known are 'auto', dummy, gguf, safetensors"):
        make_runner(path, load_format="pickle")


def test_dummy_weights_need_no_files(model, path):
    (path / "model.safetensors").unlink()
    first, second = (make_runner(path, load_format="dummy", seed=5) for _ in range(2))
    other = make_runner(path, load_format="dummy", seed=6)
    weights = [runner.model.module.model.layers[0].mlp.down_proj.weight for runner in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    driver = StepDriver(first)
    sequence = driver.sequence(prompts(12)[0])
    driver.generate([sequence], 3)
    assert torch.isfinite(torch.stack(driver.logits[sequence.row])).all()


PEAK = """
import resource, sys, threading, time
sys.path[:0] = {path!r}
from pathlib import Path
from model.step_driver import model_parts
from llmd.config import ModelConfig
from llmd.model.loader import load_model, plan_model
config, parts, folder = ModelConfig(model="big", device="cpu"), model_parts(), Path({folder!r})
blueprint = plan_model(config, folder, parts, block_size=16, kv_cache_dtype="auto")
def anonymous(key="VmHWM"):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
before = anonymous("VmRSS")
loaded = load_model(config, folder, parts, blueprint, max_model_len=64, report=lambda progress: None)
print(anonymous() - before, loaded.weights_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_weights_and_at_most_a_shard(tmp_path):
    """48 MB of weights in shards of 8 MB."""
    model = make_model("Llama", hidden_size=510, intermediate_size=2048, num_hidden_layers=3, head_dim=64, vocab_size=1000)
    save_model(model, tmp_path, max_shard_size="8MB")
    program = PEAK.format(path=sys.path, folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    grown, weights = map(int, run.stdout.split())
    assert weights > 40 << 20
    assert grown < weights + (8 << 20) + (6 << 20)  # a shard, and what allocators keep
