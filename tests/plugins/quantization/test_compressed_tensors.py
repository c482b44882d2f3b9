"""compressed-tensors: what its own compressors write, read back to what its own decompressors read."""

from functools import partial

import pytest
import torch
from plugins.quantization.compressed_packer import compressed
from plugins.quantization.packers import bit_stream, dense_of, group_of, round_by_groups

from llmd.api.v1.testing import QuantizedWeight, check_quantization
from llmd_plugins.quantization import compressed_tensors

[SPEC] = compressed_tensors.llmd_register_quantizations()
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FP8 = {"num_bits": 8, "type": "float"}
FP8_TOKENS = {**TOKENS, "type": "float"}
FP8_STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


def settings_of(form, weights, inputs):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "quantization_status": "compressed", "kv_cache_scheme": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("form", "weights", "inputs", "max_bits"),
    [
        ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group"}, None, 4.6),
        ("pack-quantized", {"num_bits": 4, "group_size": 64, "strategy": "group", "symmetric": False}, None, 4.6),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, None, 4.2),
        ("pack-quantized", {"num_bits": 8, "group_size": 32, "strategy": "group"}, None, 8.6),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, None, 8.2),
        ("pack-quantized", {"num_bits": 3, "group_size": 32, "strategy": "group", "symmetric": False}, None, 5.1),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}, TOKENS, 8.2),
        ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, {"num_bits": 8, "strategy": "tensor"}, 8.2),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, TOKENS, 8.2),
        ("naive-quantized", {"num_bits": 8, "strategy": "channel"}, None, 8.2),
        ("naive-quantized", {**FP8, "strategy": "tensor"}, None, 8.2),
        ("float-quantized", {**FP8, "strategy": "channel"}, FP8_TOKENS, 8.2),
        ("float-quantized", {**FP8, "strategy": "tensor"}, FP8_STATIC, 8.2),
        ("float-quantized", {**FP8, "strategy": "block", "block_structure": [128, 128]}, FP8_TOKENS, 8.2),
        ("float-quantized", {**FP8, "strategy": "block", "block_structure": [16, 32]}, FP8_TOKENS, 8.2),
    ],
)
def test_formats(form, weights, inputs, max_bits):
    check_quantization(
        SPEC, settings=settings_of(form, weights, inputs), quantize=partial(compressed, form=form, weights=weights, inputs=inputs),
        shapes=((37, 64), (130, 192)), max_bits=max_bits, memory_shape=(128, 896),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        ("mxfp4-pack-quantized", {"group_size": 32, "strategy": "group", "scale_dtype": torch.uint8}),
        ("nvfp4-pack-quantized", {"group_size": 16, "strategy": "tensor_group", "scale_dtype": torch.float8_e4m3fn}),
    ],
)
def test_four_bit_floats(form, weights):
    weights = {"num_bits": 4, "type": "float", "symmetric": True, **weights}
    told = {**weights, "scale_dtype": str(weights["scale_dtype"])}
    check_quantization(
        SPEC, settings=settings_of(form, told, None), quantize=partial(compressed, form=form, weights=weights),
        shapes=((37, 96), (5, 32)), max_bits=5.1, memory_shape=(128, 896),
    )  # fmt: skip


def act_ordered(weight, *, symmetric):
    """What llm-compressor wrote for actorder "group", which newer versions of the package no longer do."""
    groups = group_of(weight.shape[1], 32)[torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))]
    codes, scales, zeros = round_by_groups(weight, 4, groups, symmetric)
    tensors = {
        "weight_packed": bit_stream(codes, 4), "weight_scale": scales, "weight_g_idx": groups.to(torch.int32),
        "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip
    if not symmetric:
        tensors["weight_zero_point"] = bit_stream(zeros.T, 4).T.contiguous()
    return QuantizedWeight(tensors, dense_of(codes, scales, zeros, groups))


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order(symmetric):
    weights = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": symmetric, "actorder": "group"}
    check_quantization(
        SPEC, settings=settings_of("pack-quantized", weights, None), quantize=partial(act_ordered, symmetric=symmetric),
        shapes=((37, 96), (64, 160)), max_bits=5.3, memory_shape=(128, 896),
    )  # fmt: skip
