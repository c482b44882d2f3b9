"""Rounded weights as the tensors of the formats that others read, and the quantization_config that tells of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmd_plugins.commands.quantize.gptq import Rounded

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output lies in which bits of a word, from the lowest on


def _words(codes: Tensor, bits: int) -> Tensor:
    """[R, C] → int32 [R, C · bits / 32], codes one after another from the lowest bits on."""
    count = 32 // bits
    shift = torch.arange(count, device=codes.device) * bits
    packed = (codes.to(torch.int64).unflatten(1, (-1, count)) << shift).sum(2)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def gptq_tensors(rounded: Rounded) -> dict[str, Tensor]:
    """qweight [K · bits / 32, N], qzeros [G, N · bits / 32] (one less, as version 1 has it), scales [G, N], g_idx [K]."""
    bits, grid = rounded.grid.bits, rounded.grid
    return {
        "qweight": _words(rounded.codes, bits).T.contiguous(),
        "qzeros": _words((grid.zero - 1).T, bits),
        "scales": grid.scale.T.to(torch.float16).contiguous(),
        "g_idx": rounded.groups.to(torch.int32),
    }


def awq_tensors(rounded: Rounded) -> dict[str, Tensor]:
    """qweight [K, N / 8], qzeros [G, N / 8], scales [G, N]."""

    def packed(codes: Tensor) -> Tensor:
        order = torch.tensor(_AWQ_ORDER, device=codes.device)
        return _words(codes.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4)

    grid = rounded.grid
    scales = grid.scale.T.to(torch.float16).contiguous()
    return {"qweight": packed(rounded.codes.T), "qzeros": packed(grid.zero.T), "scales": scales}


def int8_tensors(weight: Tensor) -> dict[str, Tensor]:
    """weight int8 [N, K], weight_scale [N, 1]."""
    wide = weight.float()
    scale = (wide.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return {"weight": (wide / scale).round().clamp(-127, 127).to(torch.int8), "weight_scale": scale}


def fp8_tensors(weight: Tensor) -> dict[str, Tensor]:
    """weight float8_e4m3fn [N, K], weight_scale [N, 1]."""
    wide = weight.float()
    top = torch.finfo(torch.float8_e4m3fn).max
    scale = (wide.abs().amax(1, keepdim=True) / top).clamp_min(torch.finfo(torch.float32).tiny)
    return {"weight": (wide / scale).clamp(-top, top).to(torch.float8_e4m3fn), "weight_scale": scale}


def gptq_config(bits: int, group_size: int, desc_act: bool, damp: float) -> dict[str, Any]:
    """As AutoGPTQ, GPTQModel and transformers have it."""
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": True, "lm_head": False,
        "checkpoint_format": "gptq", "damp_percent": damp, "true_sequential": False, "static_groups": False,
        "meta": {"quantizer": ["llmd"]},
    }  # fmt: skip


def awq_config(group_size: int) -> dict[str, Any]:
    """As AutoAWQ and transformers have it."""
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": None}  # fmt: skip


def compressed_config(kind: str) -> dict[str, Any]:
    """As compressed-tensors has it; weights by output, inputs by token as they come."""
    number = {"num_bits": 8, "type": "int" if kind == "int8" else "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel", "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    form = "int-quantized" if kind == "int8" else "float-quantized"
    return {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"]}  # fmt: skip
