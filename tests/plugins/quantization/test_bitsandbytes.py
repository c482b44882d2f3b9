"""bitsandbytes' checkpoints, their tensors made by bitsandbytes itself."""

import json
from types import SimpleNamespace

import pytest
import torch
from plugins.quantization.quantized_models import agreement, quantized_model
from safetensors.torch import load_file, save_file

from llmd.api.v1.testing import make_runner
from llmd.errors import ModelError
from llmd_plugins.quantization.bitsandbytes import is_bitsandbytes
from llmd_plugins.quantization.nf4_linear import NF4

functional = pytest.importorskip("bitsandbytes.functional")


def four_bits(kind, nested, blocksize=64):
    def write(name, weight):
        packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=blocksize)
        facts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        return SimpleNamespace(dense=functional.dequantize_4bit(packed, state), tensors={"weight": packed, **facts})

    return write


def eight_bits(name, weight):
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    facts = {"weight": codes, "SCB": scale.float(), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return SimpleNamespace(dense=codes.float() * scale.float().unsqueeze(1) / 127, tensors=facts)


def settings(kind="nf4", nested=False, **changes):
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": None, **changes,
    }  # fmt: skip


SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_four_bits(tmp_path, kind, nested, family):
    model = quantized_model(tmp_path, four_bits(kind, nested), settings(kind, nested), family=family, **SIZES)
    module = make_runner(tmp_path).model.module
    layer = module.model.layers[1].self_attn.qkv_proj
    names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    dense = torch.cat([model.state_dict()[name] for name in names])
    torch.testing.assert_close(layer.method.dense_weight(layer), dense, rtol=1e-5, atol=1e-6)
    assert agreement(tmp_path, model) >= 0.95


def test_eight_bits(tmp_path):
    raw = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head"],
    }
    model = quantized_model(tmp_path, eight_bits, raw, **SIZES)
    module = make_runner(tmp_path).model.module
    layer = module.model.layers[0].mlp.gate_up_proj
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    dense = torch.cat([model.state_dict()[name] for name in names])
    torch.testing.assert_close(layer.method.dense_weight(layer), dense, rtol=1e-5, atol=1e-6)
    assert agreement(tmp_path, model) >= 0.9


def test_skipped_modules(tmp_path):
    kept = settings(llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.up_proj"])
    model = quantized_model(
        tmp_path, four_bits("nf4", False), kept, is_kept=lambda name: name in kept["llm_int8_skip_modules"], **SIZES
    )
    assert agreement(tmp_path, model) >= 0.95


def test_our_quantiles_are_theirs():
    codebook = functional.get_4bit_type("nf4", device="cpu")
    assert codebook.tolist() == list(NF4)


def change(path, name, value):
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, name: value(tensors[name])}, path / "model.safetensors")


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"
FACTS = {"quant_type": "nf4", "blocksize": 64, "shape": [128, 64], "dtype": "float32"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (STATE, lambda old: as_bytes("no json"), f"tensor {UP}.quant_state cannot be read"),
        (
            STATE,
            lambda old: as_bytes(json.dumps({**FACTS, "shape": [64, 128]})),
            r"is of shape \[64, 128\], config.json asks",
        ),
        (STATE, lambda old: as_bytes(json.dumps({**FACTS, "blocksize": 48})), "rows of 64 do not divide into blocks of 48"),
        (f"{UP}.absmax", lambda old: old[:-1], r"absmax holds 127 scales, blocks are 128"),
        (f"{UP}.absmax", lambda old: old * torch.nan, "absmax holds a scale that is negative or no finite number"),
        (f"{UP}.absmax", lambda old: old.view(1, -1), r"absmax in model.safetensors has shape \[1, 128\]"),
        (f"{UP}.absmax", lambda old: old.to(torch.uint8), "absmax"),
        (f"{UP}.quant_map", lambda old: old[:8], "quant_map must be 16 numbers"),
        (UP, lambda old: old[:-1], r"up_proj.weight in model.safetensors has shape \[4095, 1\]"),
    ],
)
def test_tensors_that_disagree(tmp_path, name, value, message):
    quantized_model(tmp_path, four_bits("nf4", False), settings(), **SIZES)
    change(tmp_path, name, value)
    with pytest.raises(ModelError, match=message):
        make_runner(tmp_path)


def test_scales_that_are_missing(tmp_path):
    quantized_model(tmp_path, four_bits("nf4", False), settings(nested=True), **SIZES)
    with pytest.raises(ModelError, match=r"the checkpoint lacks .*nested_absmax"):
        make_runner(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": False}, "one of load_in_4bit and load_in_8bit true"),
        ({"bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type must be 'nf4' or 'fp4', got 'af4'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage must be 'uint8'"),
    ],
)
def test_settings_that_are_not_served(changes, message):
    with pytest.raises(ModelError, match=message):
        is_bitsandbytes(settings(**changes))
