"""The checkpoint, its GGUF twin, and how interpreters are found."""

import json
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from benchmarks.cpu import conversions
from benchmarks.cpu.conversions import ConversionFailure, model_path, prepare
from benchmarks.cpu.engine_list import ENGINES, command, find_engines, has_module, interpreters
from benchmarks.cpu.models import TINY, tensor_shapes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the tiny model, as a checkpoint and as GGUF."""
    folder = tmp_path_factory.mktemp("models") / "made"
    prepare(folder, "tiny", "llama.cpp", "bf16", sys.executable, lambda text: None)
    return folder


def test_what_is_made_is_made_of_what_it_needs(models):
    assert sorted(path.name for path in models.iterdir()) == ["tiny-bf16", "tiny-bf16.gguf"]
    said = []
    assert prepare(models, "tiny", "vllm", "bf16", sys.executable, said.append) == models / "tiny-bf16"
    assert said == []


def test_the_checkpoint_holds_what_its_config_says(models):
    tensors = load_file(models / "tiny-bf16" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(tensor_shapes(TINY))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["model.embed_tokens.weight"].float().std() == pytest.approx(0.02, rel=0.02)
    assert json.loads((models / "tiny-bf16" / "config.json").read_text()) == TINY


def test_every_token_has_a_text(models):
    tokenizer = Tokenizer.from_file(str(models / "tiny-bf16" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == TINY["vocab_size"]
    assert tokenizer.decode([400, 1023]) == " w400 w1023"
    assert tokenizer.token_to_id("<|im_end|>") == TINY["eos_token_id"]


def test_gguf_holds_the_same_weights(models):
    reader = gguf.GGUFReader(models / "tiny-bf16.gguf")
    tensors = load_file(models / "tiny-bf16" / "model.safetensors")
    named = {tensor.name: tensor for tensor in reader.tensors}
    assert len(named) == len(tensors)
    up = named["blk.1.ffn_up.weight"]
    assert up.tensor_type == gguf.GGMLQuantizationType.BF16
    assert bytes(up.data) == tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8).numpy().tobytes()
    bias = named["blk.0.attn_q.bias"]
    assert bias.data.tolist() == tensors["model.layers.0.self_attn.q_proj.bias"].float().tolist()
    assert reader.get_field("qwen2.attention.head_count_kv").contents() == TINY["num_key_value_heads"]


def test_a_conversion_that_fails_says_why(models):
    with pytest.raises(ConversionFailure, match=r"ended with [1-9]"):
        prepare(models, "tiny", "llama.cpp", "int8", sys.executable, lambda text: None)
    assert not model_path(models, "tiny", "llama.cpp", "int8").exists()


def test_an_export_without_its_program(models, tmp_path):
    with pytest.raises(ConversionFailure, match="optimum-cli"):
        prepare(models, "tiny", "openvino", "int4", str(tmp_path / "python"), lambda text: None)


def test_the_export_asks_for_the_format(models, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(conversions, "_run", lambda line: (asked.append(line), Path(line[-1]).mkdir()))
    made = prepare(models, "tiny", "openvino", "int4", str(tmp_path / "bin" / "python"), lambda text: None)
    assert made.is_dir()
    assert asked[0][0] == str(tmp_path / "bin" / "optimum-cli")
    assert "--group-size 64 --ratio 1.0 --sym" in " ".join(asked[0])


def venv(folder):
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    return str(folder / "bin" / "python")


def test_environments_are_found_alone_and_in_folders(tmp_path):
    one, two, alone = venv(tmp_path / "all" / "one"), venv(tmp_path / "all" / "two"), venv(tmp_path / "alone")
    assert interpreters([tmp_path / "all", tmp_path / "alone", tmp_path / "absent"]) == [one, two, alone]


def test_the_first_interpreter_that_has_an_engine_runs_it():
    modules = {"a": {"llmd", "transformers"}, "b": {"transformers", "openvino_genai"}}
    found, left_out = find_engines({}, ["a", "b"], lambda python, module: module in modules[python])
    assert found == {"llmd": "a", "llmd-fresh": "a", "llmd-http": "a", "openvino": "b", "transformers": "a"}
    assert left_out["vllm"] == "no interpreter has the module vllm"


def test_a_named_interpreter_goes_first_and_must_have_its_engine():
    found, _ = find_engines({"vllm": "c"}, ["a"], lambda python, module: True)
    assert (found["vllm"], found["llmd"]) == ("c", "a")
    with pytest.raises(ValueError, match="--engine vllm: c has no module vllm"):
        find_engines({"vllm": "c"}, ["a"], lambda python, module: False)


def test_modules_are_looked_for_in_another_interpreter(tmp_path):
    assert has_module(sys.executable, "json")
    assert not has_module(sys.executable, "there_is_no_such_module")
    assert not has_module(str(tmp_path / "python"), "json")


def test_libraries_that_an_engine_wants_are_preloaded(tmp_path):
    python = venv(tmp_path / "vllm")
    assert "LD_PRELOAD" not in command("vllm", python, 2).environment
    library = tmp_path / "vllm" / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    told = command("vllm", python, 2)
    assert told.environment["LD_PRELOAD"].split(":")[0] == str(library)
    assert (told.adapter, told.environment["OMP_NUM_THREADS"]) == (ENGINES["vllm"].adapter, "2")
