"""Products with quantized weights at the sizes of a model's widest linear, beside torch's bf16 product of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.setting import Setting, Work
from llmd_kernels import fp8_linear, grouped_linear, int8_linear

_GROUP = 128
Call = Callable[[torch.Tensor], Any]
Packer = Callable[
    [Setting, int, int], tuple[Call, int]
]  # from a width and a depth to a product and the bytes of its weights


def _int4(setting: Setting, width: int, depth: int) -> tuple[Call, int]:
    groups = -(-depth // _GROUP)
    q = torch.randint(16, (width, depth), dtype=torch.uint8, device=setting.device)
    scale, offset = (torch.rand(width, groups, device=setting.device) * 0.01 + 0.001 for _ in range(2))
    weight = grouped_linear.pack(q, scale, -8 * offset, bits=4, group_size=_GROUP)
    return lambda x: grouped_linear.grouped_linear(x, weight), width * depth // 2 + 4 * width * groups


def _int8(setting: Setting, width: int, depth: int) -> tuple[Call, int]:
    q = torch.randint(-127, 128, (width, depth), dtype=torch.int8, device=setting.device)
    weight = int8_linear.pack(q, torch.rand(width, device=setting.device) * 0.01)
    return lambda x: int8_linear.int8_linear(x, weight), width * depth


def _fp8(activations: fp8_linear.Activations, block: tuple[int, int] | None) -> Packer:
    def pack(setting: Setting, width: int, depth: int) -> tuple[Call, int]:
        weight = torch.randn(width, depth, device=setting.device).clamp(-9, 9).to(torch.float8_e4m3fn)
        grid = (width,) if block is None else (-(-width // block[0]), -(-depth // block[1]))
        scale = torch.rand(grid, device=setting.device) * 0.01
        given: dict[str, Any] = {"block": block, "activations": activations}
        return lambda x: fp8_linear.fp8_linear(x, weight, scale, **given), width * depth

    return pack


def _make(pack: Packer, num_rows: int) -> Callable[[Setting, dict[str, Any]], Work]:
    def make(setting: Setting, config: dict[str, Any]) -> Work:
        depth, width = config["hidden_size"], 2 * config["intermediate_size"]
        rows = min(num_rows, 5) if setting.is_tiny else num_rows
        product, num_bytes = pack(setting, width, depth)
        x = torch.randn(rows, depth, device=setting.device).bfloat16()
        plain = torch.randn(width, depth, device=setting.device).bfloat16()
        return Work(
            lambda: product(x), lambda: torch.nn.functional.linear(x, plain),
            num_bytes + 2 * rows * (depth + width), 2 * rows * depth * width,
        )  # fmt: skip

    return make


_PACKERS: dict[str, Packer] = {
    "int4": _int4, "int8": _int8, "fp8": _fp8("float", None), "fp8 by token": _fp8("token", None),
    "fp8 by block": _fp8("group", (128, 128)),
}  # fmt: skip
MAKE = {f"{name}, {rows} rows": _make(pack, rows) for rows in (1, 64, 4096) for name, pack in _PACKERS.items()}
