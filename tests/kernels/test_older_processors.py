"""The quantized products compiled for processors without VNNI or AVX-512: the same sources, the same answers."""

import ctypes
import platform
import subprocess
from pathlib import Path

import pytest
import torch
from kernels.test_fp8_linear import made as made_fp8
from kernels.test_grouped_linear import error
from kernels.test_grouped_linear import made as made_grouped

import llmd_kernels
from llmd_kernels import native
from llmd_kernels.fp8_linear import dequantize, fp8_linear
from llmd_kernels.grouped_linear import grouped_linear
from llmd_kernels.int8_linear import int8_linear, quantize_channels

FOLDER = Path(llmd_kernels.__file__).parent
FUNCTIONS = ("llmd_grouped_linear", "llmd_fp8_linear", "llmd_int8_linear", "llmd_quantize_rows")
NEEDS = {"x86-64": "sse2", "x86-64-v3": "avx2"}


@pytest.fixture(scope="module", params=NEEDS)
def older(request, tmp_path_factory):
    if native.library() is None or platform.machine() != "x86_64" or NEEDS[request.param] not in native._cpu():
        pytest.skip("no compiler, or another processor")
    path = tmp_path_factory.mktemp("older") / "kernels.so"
    flags = [f"-march={request.param}" if flag == "-march=native" else flag for flag in native.FLAGS]
    sources = [str(FOLDER / op / "cpu.cpp") for op in ("grouped_linear", "fp8_linear", "int8_linear")]
    command = ["g++", *flags, "-O1", "-Wno-psabi", f"-I{FOLDER}", *sources, "-shared", "-o", str(path)]
    subprocess.run(command, check=True, timeout=120)
    library = ctypes.CDLL(str(path))
    for name in FUNCTIONS:
        getattr(library, name).argtypes, getattr(library, name).restype = native._SIGNATURES[name], None
    return library


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request, older, monkeypatch):
    monkeypatch.setattr(native, "_found", [older])
    return request.param


@pytest.mark.parametrize(
    ("bits", "group_size", "has_offset"), [(4, 32, False), (4, 100, True), (8, 128, True), (8, 16, False)]
)
def test_grouped(dtype, bits, group_size, has_offset):
    weight, dense = made_grouped(37, 300, bits, group_size, has_offset=has_offset)
    x = torch.randn(13, 300).to(dtype)
    y = grouped_linear(x, weight)
    assert error(y, x.float() @ dense.T) < 1e-2
    assert torch.equal(grouped_linear(x[4:6], weight), y[4:6])


@pytest.mark.parametrize("block", [None, (128, 128)])
def test_fp8(dtype, block):
    x, weight, scale, bias = made_fp8(9, 37, 300, block, dtype)
    assert (
        error(fp8_linear(x, weight, scale, bias, block=block), x.float() @ dequantize(weight, scale, block).T + bias) < 5e-3
    )


def test_int8(dtype):
    x, dense = torch.randn(9, 300).to(dtype), torch.randn(37, 300)
    assert error(int8_linear(x, *quantize_channels(dense)), x.float() @ dense.T) < 2e-2
