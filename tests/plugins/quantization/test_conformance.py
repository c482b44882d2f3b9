"""Every built-in quantization of checkpoints keeps what the conformance kit asks of any."""

from functools import partial

import pytest
from plugins.quantization import packers

from llmd.api.v1 import QuantizationSpec
from llmd.api.v1.testing import check_quantization
from llmd_kernels.int8_linear import unpack
from llmd_plugins.quantization import awq, fp8, gptq, hqq, int4, int8, modelopt, mxfp4, nf4
from llmd_plugins.quantization.gptq import GptqScheme
from llmd_plugins.quantization.gptq_linear import Gptq, GptqLinear
from llmd_plugins.quantization.online import kept_int8

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
        shapes=((32, 96), (96, 160)), memory_shape=(128, 896), ranks_shape=None if act_order else (128, 256),
        max_bits=8.8 if bits == 8 else 4.8 if symmetric else 5.3,
    )  # fmt: skip


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_awq(group_size):
    check_quantization(
        spec_of(awq, "awq"), settings={**AWQ, "group_size": group_size},
        quantize=partial(packers.awq, group_size=group_size), shapes=((8, 61), (40, 160)), memory_shape=(128, 896),
        ranks_shape=(128, 256), max_bits=5.1 if group_size == 32 else 4.8,
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
        memory_shape=(256, 896), ranks_shape=(256, 256),
    )  # fmt: skip


def test_mxfp4():
    check_quantization(
        spec_of(mxfp4, "mxfp4"), settings={"quant_method": "mxfp4"}, quantize=packers.mxfp4, shapes=((37, 96), (5, 32)),
        max_bits=4.6, memory_shape=(128, 896), ranks_shape=(128, 256),
    )  # fmt: skip


@pytest.mark.parametrize(("algo", "write", "bits"), [
    ("FP8", partial(packers.fp8, input_scale="input_scale"), 8.1), ("NVFP4", packers.nvfp4, 5.1),
])  # fmt: skip
def test_modelopt(algo, write, bits):
    check_quantization(
        spec_of(modelopt, "modelopt"), settings={"quant_method": "modelopt", "quant_algo": algo}, quantize=write,
        shapes=((37, 96), (5, 32)), max_bits=bits, memory_shape=(128, 896), ranks_shape=(128, 256),
    )  # fmt: skip


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 32), (3, 32), (2, 64), (4, None)])
def test_hqq(bits, group_size):
    weights = {"nbits": bits, "group_size": group_size, "axis": 1, "channel_wise": True, "view_as_float": False}
    given = {"weight_quant_params": weights, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
    check_quantization(
        spec_of(hqq, "hqq"), settings={"quant_method": "hqq", "quant_config": given, "skip_modules": ["lm_head"]},
        quantize=partial(packers.hqq, bits=bits, group_size=group_size or -1), shapes=((4, 192), (64, 128)),
        max_bits=9.1 if bits == 8 else 5.1, memory_shape=(128, 896),
    )  # fmt: skip


@pytest.mark.parametrize(("plugin", "max_bits"), [(int8, 8.2), (fp8, 8.2), (int4, 4.6), (nf4, 4.4)])
def test_what_quantizes_while_loading(plugin, max_bits):
    spec = plugin.llmd_register_quantizations()[0]
    check_quantization(spec, max_bits=max_bits, memory_shape=(128, 896), ranks_shape=None)


class Broken:
    """int8, with one promise broken."""

    def __init__(self, inner, **changes):
        self.__dict__ |= {"inner": inner, **changes}

    def __getattr__(self, name):
        return getattr(self.inner, name)


def broken_method(**changes):
    [spec] = int8.llmd_register_quantizations()

    def build(settings):
        quantization = spec.build(settings)
        return Broken(quantization, method=lambda layer: Broken(quantization.method(layer), **changes))

    return QuantizationSpec(name="broken", summary="x", build=build, online=True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"apply": lambda layer, x: x.new_zeros(len(x), layer.out_features)}, r"relative error 1\.0000"),
        (
            {"apply": lambda layer, x: x.float() @ unpack(kept_int8(layer)).float().T},
            "relative error|the output is torch.float32",
        ),
        ({"apply": lambda layer, x: x[:, :1]}, "the output is"),
    ],
)
def test_the_kit_finds_what_is_broken(changes, problem):
    with pytest.raises(AssertionError, match=problem):
        check_quantization(broken_method(**changes), max_bits=9)


def test_the_kit_finds_too_many_bits_and_wrong_settings():
    [spec] = int8.llmd_register_quantizations()
    with pytest.raises(AssertionError, match=r"bits a weight are kept at \(128, 896\), 4 were promised"):
        check_quantization(spec, max_bits=4, memory_shape=(128, 896))
    with pytest.raises(AssertionError, match="does not know the settings that were given"):
        check_quantization(spec_of(awq, "awq"), settings=GPTQ, quantize=packers.gptq, max_bits=9)


def test_the_kit_finds_a_missing_check_of_scales():
    """A method that takes whatever scales come."""

    class Careless(GptqLinear):
        def finish_weights(self, layer):
            layer._parameters["scales"].data.nan_to_num_().clamp_(min=1e-3)
            super().finish_weights(layer)

    class Gptq32(Gptq):
        def method(self, layer):
            return Careless(GptqScheme(4, 32, desc_act=False, zeros_less_one=True))

    spec = QuantizationSpec(name="careless", summary="x", build=Gptq32)
    with pytest.raises(AssertionError, match=r"tensor block.linear.scales holds nan, and nothing was raised"):
        check_quantization(spec, settings=GPTQ, quantize=packers.gptq, shapes=((32, 96),), max_bits=9)
