"""Every built-in quantization of checkpoints keeps what the conformance kit asks of any."""

from functools import partial

import pytest
from plugins.quantization import packers

from llmd.api.v1.testing import check_quantization
from llmd_plugins.quantization import awq, fp8, gptq, modelopt, mxfp4

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def spec_of(plugin, name):
    return next(spec for spec in plugin.llmd_register_quantizations() if spec.name == name)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "act_order", "form"),
    [
        (4, 32, True, False, "gptq"),
        (4, 64, False, False, "gptq_v2"),
        (4, 128, False, True, "gptq"),
        (4, -1, True, False, "gptq_v2"),
        (8, 32, True, True, "gptq_v2"),
        (8, -1, False, False, "gptq"),
        (3, 32, False, True, "gptq"),
        (2, 64, True, False, "gptq"),
    ],
)
def test_gptq(bits, group_size, symmetric, act_order, form):
    settings = {**GPTQ, "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": act_order}
    write = partial(
        packers.gptq, bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order, less_one=form == "gptq"
    )
    check_quantization(
        spec_of(gptq, "gptq"), settings={**settings, "checkpoint_format": form}, quantize=write,
        shapes=((32, 96), (96, 160)), memory_shape=(128, 896), max_bits=8.8 if bits == 8 else 4.8 if symmetric else 5.3,
    )  # fmt: skip


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_awq(group_size):
    check_quantization(
        spec_of(awq, "awq"), settings={**AWQ, "group_size": group_size},
        quantize=partial(packers.awq, group_size=group_size), shapes=((8, 61), (40, 160)), memory_shape=(128, 896),
        max_bits=5.1 if group_size == 32 else 4.8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "write"),
    [
        ({"weight_block_size": [128, 128]}, partial(packers.fp8, block=(128, 128), scale="weight_scale_inv")),
        ({"weight_block_size": [16, 32]}, partial(packers.fp8, block=(16, 32), scale="weight_scale_inv")),
        ({}, packers.fp8),
        ({"activation_scheme": "static"}, partial(packers.fp8, input_scale="input_scale")),
        (
            {"activation_scheme": "static", "weight_block_size": None},
            partial(packers.fp8, scale="weight_scale_inv", input_scale="activation_scale"),
        ),
        ({"quant_method": "fbgemm_fp8"}, partial(packers.fp8, by_row=True)),
    ],
)
def test_fp8(settings, write):
    check_quantization(
        spec_of(fp8, "fp8"), settings={**FP8, **settings}, quantize=write, shapes=((37, 53), (144, 200)), max_bits=8.2,
        memory_shape=(256, 896),
    )  # fmt: skip


def test_mxfp4():
    check_quantization(
        spec_of(mxfp4, "mxfp4"), settings={"quant_method": "mxfp4"}, quantize=packers.mxfp4, shapes=((37, 96), (5, 32)),
        max_bits=4.6, memory_shape=(128, 896),
    )  # fmt: skip


@pytest.mark.parametrize(("algo", "write", "bits"), [
    ("FP8", partial(packers.fp8, input_scale="input_scale"), 8.1), ("NVFP4", packers.nvfp4, 5.1),
])  # fmt: skip
def test_modelopt(algo, write, bits):
    check_quantization(
        spec_of(modelopt, "modelopt"), settings={"quant_method": "modelopt", "quant_algo": algo}, quantize=write,
        shapes=((37, 96), (5, 32)), max_bits=bits, memory_shape=(128, 896),
    )  # fmt: skip
