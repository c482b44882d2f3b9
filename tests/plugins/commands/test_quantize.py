"""`llmd quantize`: what it writes is read by the daemon and by the formats' own tools, and is better than rounding."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from model.tiny_models import make_model, save_model
from safetensors.torch import load_file

from llmd import LLM, SamplingParams
from llmd.errors import ModelError
from llmd_plugins.commands.quantize.awq import best_scale
from llmd_plugins.commands.quantize.command import quantize
from llmd_plugins.commands.quantize.gptq import gptq
from llmd_plugins.commands.quantize.rounding import round_to_nearest
from llmd_plugins.commands.quantize.run import Settings, run
from llmd_plugins.commands.quantize.samples import read_samples
from llmd_plugins.commands.quantize.writer import Writer
from llmd_plugins.sources.demo_source import folder

ROOT = Path(__file__).parents[3]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text((ROOT / "README.md").read_text())
    return path


@pytest.fixture
def tiny(tmp_path):
    """A model whose tokenizer is the demo's."""
    path = save_model(make_model("Llama", vocab_size=2048, initializer_range=0.1, **SHAPE), tmp_path / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((folder() / name).read_bytes())
    return path


def made_inputs(num_tokens=400, depth=256, seed=0):
    """Inputs as they are behind a norm: correlated, some features far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(depth, depth, generator=generator) / 16 + torch.eye(depth)
    size = torch.exp(torch.randn(depth, generator=generator))
    return torch.randn(num_tokens, depth, generator=generator) @ mix * size


def output_error(weight, values, x):
    return float((x @ (values - weight).T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128, 256])
def test_gptq_is_better_than_rounding(bits, group_size, desc_act):
    x, weight = made_inputs(), torch.randn(48, 256) * 0.05
    rounded = gptq(weight, x.T @ x, bits=bits, group_size=group_size, damp=0.01, desc_act=desc_act)
    codes, grid = round_to_nearest(weight, group_size, bits, symmetric=True)
    plain = grid.values(codes, torch.arange(256) // group_size)
    assert output_error(weight, rounded.values(), x) < 0.8 * output_error(weight, plain, x)
    assert rounded.codes.min() >= 0
    assert rounded.codes.max() < 1 << bits
    assert sorted(rounded.groups.tolist()) == sorted((torch.arange(256) // group_size).tolist())


def test_gptq_of_inputs_that_never_come():
    x, weight = made_inputs(), torch.randn(32, 256)
    x[:, 7] = 0
    rounded = gptq(weight, x.T @ x, bits=4, group_size=32, damp=0.01, desc_act=False)
    assert rounded.values().isfinite().all()
    with pytest.raises(ValueError, match="no inverse"):
        gptq(weight, torch.full((256, 256), torch.nan), bits=4, group_size=32, damp=0.01, desc_act=False)


def test_awq_is_better_than_rounding():
    x, weight = made_inputs(), torch.randn(48, 256) * 0.05
    scale = best_scale([weight], x.T @ x, x.abs().mean(0), group_size=64, bits=4)
    groups = torch.arange(256) // 64
    errors = []
    for each in (scale, torch.ones_like(scale)):
        codes, grid = round_to_nearest(weight * each, 64, 4, symmetric=False)
        errors.append(output_error(weight, grid.values(codes, groups) / each, x))
    assert errors[0] < 0.9 * errors[1]


OPTIONS = {
    "gptq": {"group_size": 32},
    "gptq-8-order": {"method": "gptq", "bits": 8, "group_size": 64, "desc_act": True},
    "gptq-row": {"method": "gptq", "group_size": -1},
    "awq": {"group_size": 64},
    "int8": {},
    "fp8": {},
}


def prompt_logits(path, ids):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_daemon_reads_what_is_written(tmp_path, tiny, data, name):
    options = {"method": name, **OPTIONS[name]}
    settings = Settings(data=data, num_samples=8, sample_length=128, device="cpu", **options)
    lines = []
    summary = run(str(tiny), tmp_path / "made", settings, lines.append)
    assert " MB, of " in summary
    names = set(load_file(tmp_path / "made" / "model.safetensors"))
    assert "lm_head.weight" in names
    assert any(("qweight" if settings.method in ("gptq", "awq") else "weight_scale") in each for each in names)
    ids = list(range(100, 140))
    expected = prompt_logits(tiny, ids)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5, prompt_logprobs=5)
    with LLM(str(tmp_path / "made"), dtype="float32", device="cpu", kv_cache_bytes=8 << 20) as llm:
        (answer,) = llm.generate([{"prompt_token_ids": ids}], params)
    told = torch.log_softmax(expected[-1], 0)
    for token_id, logprob in answer.outputs[0].logprobs[0].items():
        assert abs(float(told[token_id]) - logprob.logprob) < (1.5 if settings.bits == 4 else 0.3)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_transformers_reads_eight_bits(tmp_path, tiny, kind):
    pytest.importorskip("compressed_tensors")
    run(str(tiny), tmp_path / "made", Settings(method=kind, device="cpu"), lambda line: None)
    program = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        "torch.save(model(torch.tensor([list(range(100, 120))])).logits[0].detach(), sys.argv[2])\n"
    )
    target = tmp_path / "logits.pt"
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "made"), str(target)]
    subprocess.run(command, check=True, capture_output=True)
    seen, expected = torch.load(target, weights_only=True), prompt_logits(tiny, list(range(100, 120)))
    assert torch.nn.functional.cosine_similarity(seen, expected).min() > 0.98


def test_shards_and_what_stands_beside(tmp_path, tiny):
    settings = Settings(method="int8", device="cpu", max_shard_bytes=1 << 20)
    run(str(tiny), tmp_path / "made", settings, lambda line: None)
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        for name in load_file(tmp_path / "made" / file):
            assert index["weight_map"][name] == file
    assert (tmp_path / "made" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptq"}, "--method gptq needs --data"),
        ({"method": "awq", "bits": 8}, "--bits must be 4 for awq, got 8"),
        ({"method": "awq", "group_size": 48}, "--group-size must be one of 32, 64, 128, -1, got 48"),
        ({"method": "awq", "group_size": 128}, r"of shape \[64, 64\] does not divide into groups of 128"),
        ({"method": "int8", "desc_act": True}, "--desc-act is of gptq, not of int8"),
        ({"method": "int8", "device": "cuda:99"}, "this machine has no GPU|invalid"),
        ({"method": "int8", "device": "tpu!"}, "--device must be auto, cpu, cuda or cuda:N, got 'tpu!'"),
        ({"method": "gptq", "group_size": 32, "sample_length": 1 << 16}, "not one sample of 256|calibrat"),
    ],
)
def test_what_cannot_be_done(tmp_path, tiny, data, options, message):
    options = {"device": "cpu"} | options
    if options["method"] != "gptq" or "group_size" in options:
        options["data"] = data
    if "sample_length" in options:
        options["data"] = tmp_path / "short.txt"
        options["data"].write_text("few words")
    with pytest.raises(ModelError, match=message):
        run(str(tiny), tmp_path / "made", Settings(**options), lambda line: None)
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.glob(".*"))


def test_models_of_another_kind(tmp_path, data):
    path = save_model(make_model("Phi3", vocab_size=2048, pad_token_id=0, **SHAPE), tmp_path / "phi")
    settings = Settings(method="gptq", data=data, group_size=32, device="cpu")
    with pytest.raises(
        ModelError, match=r"Phi3ForCausalLM: module model.layers.0.self_attn.qkv_proj is not of Llama's kind"
    ):
        run(str(path), tmp_path / "made", settings, lambda line: None)


def test_a_folder_that_exists_and_a_model_that_is_quantized(tmp_path, tiny):
    with pytest.raises(ModelError, match="tiny exists already"):
        run(str(tiny), tiny, Settings(method="int8", device="cpu"), lambda line: None)
    run(str(tiny), tmp_path / "made", Settings(method="int8", device="cpu"), lambda line: None)
    with pytest.raises(ModelError, match="made is quantized already"):
        run(str(tmp_path / "made"), tmp_path / "again", Settings(method="int8", device="cpu"), lambda line: None)


def test_a_full_disk(tmp_path, monkeypatch):
    import errno
    import shutil

    writer = Writer(tmp_path / "made", 1 << 20)
    with pytest.raises(ModelError, match="bytes are free on that disk, 1152921504606846976 may be needed"):
        writer.start(1 << 60)
    writer.start(10)
    writer.add({"weight": torch.zeros(4)})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be written: the disk is full"):
        writer.finish(tmp_path / "source", {})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "hello"}\n{"txt": 1}\n', r"a.jsonl, line 2 must be \{\"text\""),
        ("a.jsonl", "no json\n", "line 1 must be"),
        ("a.txt", "few words", r"not one sample of 64 \(--sample-length\)"),
    ],
)
def test_data_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        read_samples(tmp_path / name, folder(), 4, 64)


def test_samples_of_conversations(tmp_path):
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]
    rows = [{"messages": messages}, {"text": "Once."}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows * 20))
    samples = read_samples(path, folder(), 3, 16)
    assert samples.shape == (3, 16)


def test_help_is_quick_and_names_the_methods():
    start = time.perf_counter()
    found = CliRunner().invoke(quantize, ["--help"])
    assert time.perf_counter() - start < 0.5
    assert "[gptq|awq|int8|fp8]" in found.output
    bad = CliRunner().invoke(quantize, ["demo", "--method", "hqq", "-o", "x"])
    assert bad.exit_code == 2
    assert "'hqq' is not one of 'gptq', 'awq', 'int8', 'fp8'" in bad.output
