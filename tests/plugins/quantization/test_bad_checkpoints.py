"""Checkpoints whose words and tensors do not go together are refused by name: at `llmd check` where the config tells."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from made_tokenizers import write_folder
from model.tiny_models import make_model, save_model
from plugins.quantization import packers
from plugins.quantization.quantized_models import quantized_model
from safetensors.torch import load_file, save_file

from llmd.api.v1 import QuantizationSpec
from llmd.api.v1.testing import make_runner
from llmd.errors import ModelError
from llmd.model.layers import Linear, Part, Shard, Slice
from llmd_plugins.quantization import awq, fp8, gptq, hqq, modelopt
from llmd_plugins.quantization.gptq_linear import Gptq

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
NAME = "model.layers.1.mlp.down_proj"


def hqq_settings(**weights):
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, **weights}}}


def write(name, weight):
    return packers.gptq(weight)


def change_tensors(path, **changes):
    """Tensors of NAME, changed or, with None, left out."""
    tensors = load_file(path / "model.safetensors")
    for suffix, change in changes.items():
        key = f"{NAME}.{suffix}"
        if change is None:
            del tensors[key]
        else:
            tensors[key] = change(tensors[key])
    save_file(tensors, path / "model.safetensors")


def at_first(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scales": None}, f"the checkpoint lacks tensor {NAME}.scales"),
        ({"qweight": None, "qzeros": None}, f"the checkpoint lacks 2 tensors: {NAME}.qweight, {NAME}.qzeros"),
        ({"qweight": lambda tensor: tensor[:4]}, rf"tensor {NAME}.qweight in model.safetensors has shape \[4, 64\], config"),
        (
            {"qweight": torch.Tensor.float},
            f"tensor {NAME}.qweight in model.safetensors is float32, config.json asks for int32",
        ),
        ({"scales": torch.Tensor.int}, f"tensor {NAME}.scales in model.safetensors is int32, config.json asks for float32"),
        ({"scales": at_first(float("nan"))}, f"tensor {NAME}.scales holds nan: a scale must be finite and above 0"),
        ({"scales": at_first(0.0)}, f"tensor {NAME}.scales holds 0.0"),
        ({"scales": at_first(-0.5)}, f"tensor {NAME}.scales holds -0.5"),
        ({"scales": at_first(float("inf"))}, f"tensor {NAME}.scales holds inf"),
        ({"g_idx": at_first(2)}, f"{NAME}: its g_idx does not put 32 input features into each of 3 groups"),
        ({"g_idx": at_first(99)}, f"{NAME}: its g_idx does not put 32 input features into each of 3 groups"),
    ],
)
def test_tensors(tmp_path, changes, problem):
    quantized_model(tmp_path, write, GPTQ)
    change_tensors(tmp_path, **changes)
    with pytest.raises(ModelError, match=problem):
        make_runner(tmp_path)


def test_the_part_of_a_merged_linear_is_named(tmp_path):
    quantized_model(tmp_path, write, GPTQ)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.scales"][1, 31] = 0
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"tensor model.layers.0.self_attn.v_proj.scales holds 0.0"):
        make_runner(tmp_path)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({**GPTQ, "bits": 8}, r"down_proj.qweight in model.safetensors has shape|o_proj.qweight|q_proj.qweight"),
        ({**GPTQ, "group_size": 64}, "has shape"),
        ({**AWQ}, "has shape|lacks|no place"),
        ({"quant_method": "fp8"}, "the checkpoint lacks 21 tensors"),
        ({**GPTQ, "modules_to_not_convert": ["down_proj"]}, "the checkpoint lacks 3 tensors"),
    ],
)
def test_a_config_for_other_tensors(tmp_path, settings, problem):
    quantized_model(tmp_path, write, settings)
    with pytest.raises(ModelError, match=problem):
        make_runner(tmp_path)


def test_eight_bit_floats_without_a_quantization_config(tmp_path):
    """Their bytes would be read as if they were weights."""
    path = save_model(make_model("Llama"), tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path / "model.safetensors")
    with pytest.raises(
        ModelError, match=f"tensor {name} in model.safetensors is float8_e4m3fn, config.json asks for float32"
    ):
        make_runner(path)


def test_fp8_without_any_scale(tmp_path):
    quantized_model(tmp_path, lambda name, weight: packers.fp8(weight, scale="weight_scale_inv"), {"quant_method": "fp8"})
    change_tensors(tmp_path, weight_scale_inv=None)
    with pytest.raises(ModelError, match=f"lacks tensor {NAME}.weight_scale_inv or {NAME}.weight_scale"):
        make_runner(tmp_path)


def test_orders_of_groups_are_not_divided_among_ranks():
    columns = Slice.of(128, Shard(1, 2), "in")
    layer = Linear([Part("", Slice.of(32, None, ""))], columns, bias=False, dtype=torch.float32, device=torch.device("cpu"))
    layer.name = "down_proj"
    layer.method = Gptq({**GPTQ, "desc_act": True}).method(layer)
    layer.method.create_weights(layer)
    tensors = packers.gptq(torch.randn(32, 128), act_order=True).tensors
    for slot in layer.weight_slots():
        if not slot.is_optional or "g_idx" in slot.name:
            slot.load(tensors[slot.name.rpartition(".")[2]])
    with pytest.raises(
        ModelError, match=r"down_proj: groups in an order of their own \(desc_act, actorder\) cannot be divided"
    ):
        layer.finish_weights()


# --- what the config alone tells


@pytest.mark.parametrize(
    ("plugin", "settings", "problem"),
    [
        (hqq, hqq_settings(axis=0), "weight_quant_params.axis must be 1, got 0"),
        (hqq, hqq_settings(nbits=1), "nbits must be 2 or 3 or 4 or 8, got 1"),
        (hqq, hqq_settings(view_as_float=True), "view_as_float is True: weights disguised as floats"),
        (hqq, {"quant_method": "hqq"}, "quant_config must be an object with weight_quant_params, got None"),
        (gptq, {**GPTQ, "bits": 5}, "quantization_config.bits must be 2 or 3 or 4 or 8, got 5"),
        (gptq, {key: value for key, value in GPTQ.items() if key != "bits"}, "bits must be 2 or 3 or 4 or 8, got None"),
        (gptq, {**GPTQ, "group_size": 0}, "group_size must be -1 or a whole number above 0, got 0"),
        (gptq, {**GPTQ, "group_size": "128"}, "group_size must be -1 or a whole number above 0, got '128'"),
        (gptq, {**GPTQ, "desc_act": "yes"}, "desc_act must be true or false, got 'yes'"),
        (gptq, {**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format must be 'gptq' or 'gptq_v2', got 'marlin'"),
        (gptq, {**GPTQ, "is_marlin_format": True}, "is_marlin_format is True: weights packed for the Marlin kernel"),
        (gptq, {**GPTQ, "pack_dtype": "int16"}, "pack_dtype must be 'int32', got 'int16'"),
        (gptq, {**GPTQ, "dynamic": {".*": {"bits": 7}}}, r"dynamic\..*bits must be 2 or 3 or 4 or 8, got 7"),
        (gptq, {**GPTQ, "dynamic": ["x"]}, r"dynamic must be an object, got \['x'\]"),
        (awq, {**AWQ, "version": "gemv"}, "version must be 'gemm' or 'exllama' or 'ipex', got 'gemv'"),
        (awq, {**AWQ, "backend": "llm-awq"}, "backend must be of AutoAWQ's packing"),
        (awq, {**AWQ, "bits": 3}, "bits must be 4, got 3"),
        (fp8, {"quant_method": "fp8", "fmt": "e5m2"}, "fmt must be 'e4m3' or 'float8_e4m3fn', got 'e5m2'"),
        (fp8, {"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size must be null or two whole numbers"),
        (fp8, {"quant_method": "fp8", "activation_scheme": "none"}, "activation_scheme must be 'dynamic' or 'static'"),
        (
            modelopt,
            {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
            "quant_algo must be 'fp8' or 'nvfp4', got 'W4A8_AWQ'",
        ),
    ],
)
def test_configs(plugin, settings, problem):
    spec = plugin.llmd_register_quantizations()[0]
    with pytest.raises(ModelError, match=f"quantization_config.*{problem.removeprefix('quantization_config')}"):
        spec.check(settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({**GPTQ, "bits": 5}, "quantization_config.bits must be 2 or 3 or 4 or 8, got 5"),
        ({"quant_method": "vptq"}, "the checkpoint is quantized by 'vptq', which no plugin reads; known are "),
        ([1], "config.json: quantization_config must be an object"),
    ],
)
def test_llmd_check_tells_and_ends_with_78(tmp_path, settings, problem):
    folder = tmp_path / "m"
    quantized_model(folder, write, GPTQ)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    (tmp_path / "llmd.toml").write_text("[[models]]\nmodel = './m'\n")
    command = [sys.executable, "-m", "llmd", "check", "--config", "llmd.toml"]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 78
    assert problem in run.stderr


def test_the_daemon_does_not_start_and_ends_with_78(tmp_path):
    quantized_model(tmp_path / "m", write, GPTQ)
    change_tensors(tmp_path / "m", scales=at_first(0.0))
    write_folder("byte_level", tmp_path / "m")
    command = [sys.executable, "-m", "llmd", "serve", "./m", "--device", "cpu", "--port", "0"]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 78
    assert f"tensor {NAME}.scales holds 0.0: a scale must be finite and above 0" in run.stderr


def test_a_device_that_cannot(tmp_path):
    quantized_model(tmp_path, write, GPTQ)
    spec = gptq.llmd_register_quantizations()[0]
    only = QuantizationSpec(name="gptq", summary="x", build=spec.build, check=spec.check, devices=("cuda",))
    with pytest.raises(ModelError, match=r"quantization 'gptq' runs on cuda, this model is on cpu; what cpu can run: .*awq"):
        make_runner(tmp_path, only, quantization="gptq")


def test_a_checkpoint_that_is_not_quantized(tmp_path):
    path = save_model(make_model("Llama"), tmp_path)
    with pytest.raises(ModelError, match="quantization 'gptq' needs a checkpoint that is quantized so; this one is not"):
        make_runner(path, quantization="gptq")


def test_by_the_name_that_vllm_has_for_it(tmp_path):
    quantized_model(tmp_path, partial(write), GPTQ)
    assert make_runner(tmp_path, quantization="gptq_marlin").info.facts["quantization"] == "gptq_marlin"
