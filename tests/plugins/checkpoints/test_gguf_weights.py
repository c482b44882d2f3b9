"""GGUF files: their blocks against the format's own package, their models against Hugging Face's."""

import json

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from model.step_driver import StepDriver, make_runner
from model.tiny_models import make_model, prompts, reference_generate, reference_logits

from llmd.config import ModelConfig
from llmd.errors import ModelError
from llmd_kernels.grouped_linear import pack, unpack
from llmd_plugins.checkpoints.gguf.blocks import KINDS, dequantize
from llmd_plugins.checkpoints.gguf.folder import make_folder, resolve

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def random_blocks(name, count=24):
    """Blocks of random bits with sensible scales."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (count, size), dtype=np.uint8)
    for start in {"Q6_K": (208,), "Q5_0": (0,), "Q4_0": (0,), "Q8_0": (0,)}.get(name, (0, 2)):
        scale = generator.uniform(0.001, 0.02, (count, 1)).astype(np.float16)
        blocks[:, start : start + 2] = scale.view(np.uint8)
    return blocks, block


@pytest.mark.parametrize("name", KINDS)
def test_blocks_are_what_the_format_says(name):
    blocks, size = random_blocks(name)
    kind = KINDS[name]
    codes, scale, offset = kind.split(torch.from_numpy(blocks))
    wanted = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]))
    torch.testing.assert_close(dequantize(kind, codes, scale, offset), wanted, rtol=1e-6, atol=1e-6)
    rows, groups = 4, (6 * size) // kind.group_size
    packed = pack(
        codes.view(rows, -1), scale.view(rows, groups), None if offset is None else offset.view(rows, groups),
        bits=kind.bits, group_size=kind.group_size, zero=kind.zero,
    )  # fmt: skip
    largest = wanted.view(rows, groups, -1).abs().amax(2, keepdim=True)
    error = (unpack(packed) - wanted.view(rows, -1)).view(rows, groups, -1).abs()
    assert (error <= largest * 2e-3 + 1e-6).all()


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize("tied", [True, False])
def test_greedy_tokens_of_float_files_are_hugging_faces(tmp_path, family, kind, tied):
    model = make_model(family, tie_word_embeddings=tied, **SHAPE)
    held = gguf_files.write_model(model, tmp_path / "model.gguf", kind)
    model.load_state_dict(held, strict=False)
    runner = make_runner(make_folder(tmp_path / "model.gguf"))
    driver = StepDriver(runner)
    sequences = [driver.sequence(prompt) for prompt in prompts(9, 23)]
    driver.generate(sequences, 6)
    for sequence in sequences:
        assert sequence.tokens == reference_generate(model, sequence.tokens[: sequence.num_prompt], 6)


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "mixed"])
def test_logits_of_quantized_files(tmp_path, kind):
    model = make_model("Llama" if kind in ("Q8_0", "mixed") else "Qwen2", initializer_range=0.1, **SHAPE)
    mixed = {"v_proj": "Q8_0", "down_proj": "F16", "up_proj": "Q5_1", "embed_tokens": "Q8_0"}
    kinds = (lambda name: mixed.get(name.split(".")[-2], "Q4_0")) if kind == "mixed" else kind
    held = gguf_files.write_model(model, tmp_path / "model.gguf", kinds)
    model.load_state_dict(held, strict=False)
    runner = make_runner(make_folder(tmp_path / "model.gguf"))
    assert runner.info.facts["quantization"] == (None if kind == "BF16" else "gguf")
    driver = StepDriver(runner)
    sequences = [driver.sequence(prompt) for prompt in prompts(9, 30)]
    driver.generate(sequences, 3, chunks=(5,))
    for sequence in sequences:
        expected = reference_logits(model, sequence.tokens)[sequence.num_prompt - 1 : -1]
        seen = torch.stack(driver.logits[sequence.row])
        assert ((seen - expected).norm() / expected.norm()) < 0.03


def test_a_quantized_file_can_be_loaded_dense(tmp_path):
    model = make_model("Llama", **SHAPE)
    held = gguf_files.write_model(model, tmp_path / "model.gguf", "Q4_0")
    folder = make_folder(tmp_path / "model.gguf")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    module = make_runner(folder).model.module
    rows = torch.cat([held[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"])
    torch.testing.assert_close(module.model.layers[1].self_attn.qkv_proj.weight.data, rows)


def test_a_float_file_can_be_quantized_while_it_loads(tmp_path):
    gguf_files.write_model(make_model("Llama", **SHAPE), tmp_path / "model.gguf", "F16")
    runner = make_runner(make_folder(tmp_path / "model.gguf"), quantization="int4")
    assert runner.info.facts["quantization"] == "int4"
    assert runner.model.module.model.layers[0].mlp.gate_up_proj.grouped.bits == 4


def test_a_quantized_file_takes_no_other_method(tmp_path):
    gguf_files.write_model(make_model("Llama", **SHAPE), tmp_path / "model.gguf", "Q4_0")
    folder = make_folder(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="quantized by 'gguf', which is not 'int8'"):
        make_runner(folder, quantization="int8")
    with pytest.raises(ModelError, match="this checkpoint is quantized already"):
        make_runner(folder, quantization_options={"ignore": []})


def test_a_folder_of_one_file_and_parts(tmp_path):
    model = make_model("Llama", **SHAPE)
    (tmp_path / "folder").mkdir()
    gguf_files.write_model(model, tmp_path / "folder" / "model.gguf", "F32")
    made = resolve(ModelConfig(model=str(tmp_path / "folder")), lambda progress: None)
    assert make_runner(made).info.facts["quantization"] is None
    assert made == make_folder(tmp_path / "folder" / "model.gguf")  # made once
    (tmp_path / "folder" / "model.gguf").rename(tmp_path / "folder" / "model-00001-of-00002.gguf")
    with pytest.raises(ModelError, match=r"model-00002-of-00002.gguf is missing: model-00001"):
        resolve(ModelConfig(model=str(tmp_path / "folder")), lambda progress: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "longrope"}, "must be none, linear or yarn, got 'longrope'"),
        ({"llama.feed_forward_length": "96"}, "feed_forward_length of the GGUF file must be one whole number"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model of the GGUF file must be 'gpt2' or 'llama', got 'rwkv'"),
        ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre of the GGUF file is 'viking'; known are gpt-2"),
        ({"tokenizer.ggml.bos_token_id": 97}, "bos_token_id of the GGUF file is 97, of 97 tokens"),
    ],
)
def test_metadata_that_cannot_be_served(tmp_path, changes, message):
    model = make_model("Llama", **SHAPE)
    tokenizer = gguf_files.plain_tokenizer(97)
    clean = {key: value for key, value in tokenizer.items() if key not in changes}
    if "llama.feed_forward_length" in changes:
        path = tmp_path / "model.gguf"
        gguf_files.write_model(model, path, "F32", tokenizer=clean)
        path.write_bytes(path.read_bytes().replace(b"llama.feed_forward_length", b"llama.feed_forward_lengtX"))
    else:
        gguf_files.write_model(model, tmp_path / "model.gguf", "F32", tokenizer=clean, changes=changes)
    with pytest.raises(ModelError, match=message):
        make_folder(tmp_path / "model.gguf")


def test_types_that_are_not_read_are_named(tmp_path):
    model = make_model("Llama", **SHAPE)
    gguf_files.write_model(model, tmp_path / "model.gguf", "F32")
    raw = (tmp_path / "model.gguf").read_bytes()
    at = raw.index(b"output.weight") + len(b"output.weight") + 4 + 16
    (tmp_path / "model.gguf").write_bytes(raw[:at] + (20).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(ModelError, match=r"attn_output.weight is of type IQ4_NL; types that are read: F32, F16"):
        make_folder(tmp_path / "model.gguf")


@pytest.mark.parametrize("size", [0, 3, 20, 200, 3000, -1000])
def test_files_that_are_cut_off(tmp_path, size):
    path = tmp_path / "model.gguf"
    gguf_files.write_model(make_model("Llama", **SHAPE), path, "F32")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"model.gguf (is truncated|cannot be read|is no GGUF)"):
        make_folder(path)


def test_a_file_that_is_something_else(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelError, match=r"model.gguf is no GGUF file"):
        make_folder(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + (1).to_bytes(4, "big") + bytes(100))
    with pytest.raises(ModelError, match=r"GGUF version 16777216; versions 2 and 3, little-endian"):
        make_folder(tmp_path / "model.gguf")


def test_scales_that_are_no_numbers(tmp_path):
    path = tmp_path / "model.gguf"
    model = make_model("Llama", **SHAPE)
    gguf_files.write_model(model, path, "Q8_0")
    reader = gguf.GGUFReader(path, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight")
    tensor.data.reshape(-1)[0:2] = np.array([np.nan], np.float16).view(np.uint8)
    reader.data.flush()
    with pytest.raises(ModelError, match=r"tensor blk.1.ffn_up.weight of the GGUF file holds a scale that is no finite"):
        make_runner(make_folder(path))
