"""Whole models as other tools quantize them: their tokens are those of the dense model that the weights stand for."""

import json
from functools import partial

import pytest
import torch
from plugins.quantization import packers
from plugins.quantization.compressed_packer import compressed
from plugins.quantization.quantized_models import agreement, quantized_model

from llmd.api.v1.testing import make_runner
from llmd.errors import ModelError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


def all_alike(write):
    return lambda name, weight: write(weight)


def groups(form, weights, inputs=None, targets=("Linear",)):
    return {"targets": list(targets), "weights": weights, "input_activations": inputs, "format": form}


def compressed_settings(*config_groups, form="mixed-precision", ignore=("lm_head",)):
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": list(ignore),
        "config_groups": {f"group_{index}": group for index, group in enumerate(config_groups)},
    }  # fmt: skip


W4 = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "symmetric": True}
W8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
F8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize(
    ("settings", "write"),
    [
        (GPTQ, packers.gptq),
        ({**GPTQ, "desc_act": True, "checkpoint_format": "gptq_v2"}, partial(packers.gptq, act_order=True, less_one=False)),
        ({**GPTQ, "bits": 8, "sym": False}, partial(packers.gptq, bits=8, symmetric=False)),
        (AWQ, packers.awq),
        (FP8, partial(packers.fp8, block=(128, 128), scale="weight_scale_inv")),
        ({**FP8, "weight_block_size": None}, packers.fp8),
        ({"quant_method": "mxfp4"}, packers.mxfp4),
        (compressed_settings(groups("pack-quantized", W4)), partial(compressed, form="pack-quantized", weights=W4)),
        (compressed_settings(groups("int-quantized", W8, TOKENS)), partial(compressed, form="int-quantized", weights=W8)),
        (compressed_settings(groups("float-quantized", F8)), partial(compressed, form="float-quantized", weights=F8)),
    ],
)
def test_tokens(tmp_path, family, settings, write):
    model = quantized_model(tmp_path, all_alike(write), settings, family=family)
    assert agreement(tmp_path, model) >= 0.95
