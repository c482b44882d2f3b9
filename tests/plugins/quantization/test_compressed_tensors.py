"""compressed-tensors: what its own compressors write, read back to what its own decompressors read."""

from functools import partial

import pytest
import torch
from plugins.quantization.compressed_packer import compressed
from plugins.quantization.packers import bit_stream, dense_of, group_of, round_by_groups

from llmd.api.v1.testing import QuantizedWeight, check_quantization
from llmd.errors import ModelError
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
    write = partial(compressed, form=form, weights=weights, inputs=inputs)
    check_quantization(
        SPEC, settings=settings_of(form, weights, inputs), quantize=write, shapes=((37, 64), (130, 192)), max_bits=max_bits,
        memory_shape=(128, 896), ranks_shape=(256, 256),
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
        shapes=((37, 96), (5, 32)), max_bits=5.1, memory_shape=(128, 896), ranks_shape=(128, 256),
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


def test_formats_that_are_refused_say_why():
    packed = {"num_bits": 4, "group_size": 32, "strategy": "group"}
    good = settings_of("pack-quantized", packed, None)
    [group] = good["config_groups"].values()
    for changes, problem in (
        ({"format": "marlin-24"}, r"quantization_config.format must be 'pack-quantized' or .*, got 'marlin-24'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config.format is 'sparse-24-bitmask': sparse"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config is .*: rotations of activations"),
        ({"config_groups": {}}, "config_groups must be an object of groups with weights"),
        (
            {"config_groups": {"a": {**group, "weights": {**packed, "num_bits": 9}}}},
            r"a.weights.num_bits must be from 2 to 8",
        ),
        ({"config_groups": {"a": {**group, "weights": {**packed, "type": "float"}}}}, "num_bits must be 8 for floats"),
        ({"config_groups": {"a": {**group, "output_activations": packed}}}, "a.output_activations is .*: quantized outputs"),
        ({"config_groups": {"a": {**group, "weights": {**packed, "strategy": "rows"}}}}, "strategy must be 'tensor' or"),
        ({"ignore": 7}, "ignore must be a list of module names, got 7"),
    ):
        with pytest.raises(ModelError, match=problem):
            SPEC.check({**good, **changes})


def test_a_shape_that_is_not_the_configs():
    form, weights = "pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group"}

    def write(weight):
        written = compressed(weight, form=form, weights=weights)
        return written._replace(tensors={**written.tensors, "weight_shape": torch.tensor([1, 2])})

    with pytest.raises(ModelError, match=r"tensor block.linear.weight_shape says \[1, 2\], config.json asks for \[37, 64\]"):
        check_quantization(SPEC, settings=settings_of(form, weights, None), quantize=write, shapes=((37, 64),), max_bits=5)
