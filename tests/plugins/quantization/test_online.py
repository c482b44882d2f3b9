"""What all methods that quantize while loading share: which layers, the table of tokens, memory, and what is refused."""

import subprocess
import sys

import pytest
import torch
from model.step_driver import StepDriver, make_runner
from model.tiny_models import make_model, prompts, reference_logits, save_model

from llmd.errors import ModelError
from llmd.model.layers import Embedding, Linear, LMHead, Part, Slice
from llmd_plugins.quantization.fp8_online import Fp8Online, Fp8OnlineLinear
from llmd_plugins.quantization.int4_linear import Int4, Int4Linear
from llmd_plugins.quantization.int8_linear import Int8, Int8Linear
from llmd_plugins.quantization.nf4_linear import Nf4, Nf4Linear
from llmd_plugins.quantization.online import Int8Table

METHODS = {
    "fp8": (Fp8Online, Fp8OnlineLinear, 0.04),
    "int4": (Int4, Int4Linear, 0.10),
    "int8": (Int8, Int8Linear, 0.02),
    "nf4": (Nf4, Nf4Linear, 0.11),
}


def make_linear(method, tensors, dtype=torch.float32):
    """A linear of these tensors, one part or several merged."""
    sizes = {name.removesuffix(".weight"): tensor.shape for name, tensor in tensors.items() if name.endswith("weight")}
    columns = next(iter(sizes.values()))[1]
    parts = [Part(name, Slice(rows, 0, rows)) for name, (rows, _) in sizes.items()]
    bias = any(name.endswith("bias") for name in tensors)
    layer = Linear(parts, Slice(columns, 0, columns), bias=bias, dtype=dtype, device=torch.device("cpu"))
    layer.name, layer.method = "merged", method
    method.create_weights(layer)
    for slot in layer.weight_slots():
        slot.load(tensors[slot.name])
    layer.finish_weights()
    return layer


def random_tensors(rows=(37, 12), columns=150, bias=True):
    torch.manual_seed(0)
    tensors = {f"part{index}.weight": torch.randn(size, columns) * 0.05 for index, size in enumerate(rows)}
    return tensors | ({f"part{index}.bias": torch.randn(size) for index, size in enumerate(rows)} if bias else {})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_linears_are_close_at_odd_shapes(name, bias, dtype):
    _, make, allowed = METHODS[name]
    tensors = random_tensors(bias=bias)
    layer = make_linear(make(), tensors, dtype)
    weight = torch.cat([tensors["part0.weight"], tensors["part1.weight"]])
    dense = layer.method.dense_weight(layer)
    assert ((dense - weight).norm() / weight.norm()) < allowed
    for size in (1, 3, 17):
        x = torch.randn(size, 150).to(dtype)
        wanted = x.float() @ dense.T + (torch.cat([tensors["part0.bias"], tensors["part1.bias"]]) if bias else 0)
        assert ((layer(x).float() - wanted).norm() / wanted.norm()) < 1e-2
        assert layer(x).dtype == dtype


@pytest.mark.parametrize("name", METHODS)
def test_a_model_is_close_and_holds_no_dense_weight(tmp_path, name):
    model = make_model("Qwen2", hidden_size=120, initializer_range=0.05)
    runner = make_runner(save_model(model, tmp_path), quantization=name)
    for layer in runner.model.module.modules():
        if isinstance(layer, Linear | Embedding | LMHead):
            assert all(p.itemsize == 1 or p.dim() == 1 for p in layer._parameters.values() if p is not None)
    driver = StepDriver(runner)
    sequences = [driver.sequence(prompt) for prompt in prompts(9, 30, 3)]
    driver.generate(sequences, 4, chunks=(5,))
    for sequence in sequences:
        expected = reference_logits(model, sequence.tokens)[sequence.num_prompt - 1 : -1]
        seen = torch.stack(driver.logits[sequence.row])
        assert torch.nn.functional.cosine_similarity(seen, expected).min() > (0.99 if name.endswith("8") else 0.93)


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_has_eight_bits_tied_or_not(tmp_path, tied):
    model = make_model("Llama", tie_word_embeddings=tied)
    runner = make_runner(save_model(model, tmp_path), quantization="int8", dtype="bfloat16")
    module = runner.model.module
    table = module.model.embed_tokens
    assert table.weight.dtype in (torch.uint8, torch.int8)
    assert isinstance(table.method, Int8Table)
    wanted = model.model.embed_tokens.weight
    assert table(torch.arange(97)).dtype == torch.bfloat16
    assert ((table.table.float() - wanted).norm() / wanted.norm()) < 0.02
    hidden = torch.randn(3, 60)
    logits = module.logits(hidden)
    assert logits.dtype == torch.float32
    expected = hidden @ model.lm_head.weight.T
    assert ((logits - expected).norm() / expected.norm()) < 0.02


def test_ignored_layers_stay_as_they_are(tmp_path):
    path = save_model(make_model("Llama"), tmp_path)
    options = {"ignore": ["lm_head", "embed_tokens", "*.0.self_attn.*"], "group_size": 64}
    module = make_runner(path, quantization="int4", quantization_options=options).model.module
    assert module.lm_head.linear is None
    assert module.model.embed_tokens.weight.dtype == torch.float32
    assert module.model.layers[0].self_attn.qkv_proj.weight.dtype == torch.float32
    assert module.model.layers[1].mlp.down_proj.grouped.group_size == 64


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int4", {"group_size": 48}, r"group_size must be one of \(32, 64, 128\), got 48"),
        ("int4", {"bits": 3}, "no key 'bits' for this method; allowed: ignore, group_size"),
        ("nf4", {"ignore": "lm_head"}, "ignore must be a list of names of layers, got 'lm_head'"),
        (None, {"ignore": []}, "for a method that quantizes while loading, and none is named"),
    ],
)
def test_options_that_are_wrong(tmp_path, name, options, message):
    path = save_model(make_model("Llama"), tmp_path)
    with pytest.raises(ModelError, match=message):
        make_runner(path, quantization=name, quantization_options=options)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(name, value):
    tensors = random_tensors()
    tensors["part1.weight"][3, 149] = value
    with pytest.raises(ModelError, match=r"part0.weight or part1.weight holds NaN, infinity"):
        make_linear(METHODS[name][1](), tensors)


@pytest.mark.parametrize("name", METHODS)
def test_zeros_and_tiny_weights(name):
    tensors = random_tensors(bias=False)
    tensors["part0.weight"].zero_()
    tensors["part1.weight"].mul_(1e-9)
    layer = make_linear(METHODS[name][1](), tensors)
    assert layer.method.dense_weight(layer).abs().max() < 1e-6


PEAK = """
import json, sys
from pathlib import Path
from llmd.config import ModelConfig
from llmd.model.loader import load_model, plan_model
from model.step_driver import model_parts
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def load(path):
    model, parts = ModelConfig(model=path, quantization=sys.argv[3], device="cpu", dtype="bfloat16"), model_parts()
    blueprint = plan_model(model, Path(path), parts, block_size=16, kv_cache_dtype="auto")
    return load_model(model, Path(path), parts, blueprint, max_model_len=64, report=lambda progress: None)
load(sys.argv[1])  # what is there once: libraries, thread pools
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load(sys.argv[2])
print(json.dumps([status("VmHWM") - before, model.weights_bytes, status("VmRSS") - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", METHODS)
def test_the_peak_is_the_quantized_size_and_a_shard(tmp_path, name, request):
    import json

    small = save_model(make_model("Llama"), tmp_path / "small")
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "head_dim": 64}
    model = make_model("Llama", num_attention_heads=8, vocab_size=16384, tie_word_embeddings=True, **shape).bfloat16()
    large = save_model(model, tmp_path / "large", max_shard_size="20MB")
    shards = [path.stat().st_size for path in large.glob("*.safetensors")]
    assert len(shards) >= 5
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(small), str(large), name],
        capture_output=True, text=True, check=True, cwd=request.config.rootpath / "tests",
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "PYTHONPATH": "."},
    )  # fmt: skip
    peak, held, _ = json.loads(run.stdout.splitlines()[-1])
    assert held < (0.55 if name.endswith("8") else 0.36) * sum(shards)
    assert peak < held + max(shards) + (12 << 20)
